# seed 4101378: raises at call 1
#   Error in op: input
#   This error most often comes from a incorrect fake (aka meta) kernel for a custom op.
#   Use torch.library.opcheck to test your custom op.
#   See https://pytorch.org/docs/stable/library.html#torch.library.opcheck
#   {'seed': 4101378, 'width': 40, 'dtype': 'float32', 'mode': 'train', 'autocast': 'none', 'dynamic': True, 'storage': 'dense', 'annotated': False, 'merge': True, 'through': 'inductor', 'frozen': True, 'flat': False, 'input': 'transposed', 'calls': ((2, 8), (2, 2), (1, 17), (2, 8)), 'writes': ('none', 'none', 'none')}
#   # chain
#   t = F.relu(self.w0_0(h))
#   h = torch.addmm(self.w0_1_bias, (t).reshape(-1, 16), self.w0_1).view(*(t).shape[:-1], 40)
#   # siblings
#   a, b, c = self.w1_0(h), self.w1_1(h), self.w1_2(h)
#   outs.append(b.view(b.shape[0], -1))
#   h = a * torch.sigmoid(c)
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

F32, BF16 = torch.float32, torch.bfloat16

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.w0_0 = nn.Linear(40, 16, bias=False)
        self.w0_1 = nn.Parameter(torch.zeros(16, 40))
        self.w0_1_bias = nn.Parameter(torch.zeros([40]))
        self.w1_0 = nn.Linear(40, 40, bias=True)
        self.w1_1 = nn.Linear(40, 16, bias=True)
        self.w1_2 = nn.Linear(40, 40, bias=True)

    def forward(self, x, flag=True):
        h, e, outs = x * 1, x, []
        # chain
        t = F.relu(self.w0_0(h))
        h = torch.addmm(self.w0_1_bias, (t).reshape(-1, 16), self.w0_1).view(*(t).shape[:-1], 40)
        # siblings
        a, b, c = self.w1_0(h), self.w1_1(h), self.w1_2(h)
        outs.append(b.view(b.shape[0], -1))
        h = a * torch.sigmoid(c)
        return [h, *outs]

WEIGHTS = [{'name': 'w0_0', 'form': 'linear', 'out_features': 16, 'in_features': 40, 'bias': 'none', 'spec': '16:2:8'},
 {'name': 'w0_1', 'form': 'conv1d', 'out_features': 40, 'in_features': 16, 'bias': 'row', 'spec': '16:2:8'},
 {'name': 'w1_0', 'form': 'linear', 'out_features': 40, 'in_features': 40, 'bias': 'row', 'spec': '16:2:8'},
 {'name': 'w1_1', 'form': 'linear', 'out_features': 16, 'in_features': 40, 'bias': 'row', 'spec': '16:2:8'},
 {'name': 'w1_2', 'form': 'linear', 'out_features': 40, 'in_features': 40, 'bias': 'row', 'spec': '1:1:4'}]
SETTINGS = {'seed': 4101378,
 'width': 40,
 'dtype': 'float32',
 'mode': 'train',
 'autocast': 'none',
 'dynamic': True,
 'storage': 'dense',
 'annotated': False,
 'merge': True,
 'through': 'inductor',
 'frozen': True,
 'flat': False,
 'input': 'transposed',
 'calls': ((2, 8), (2, 2), (1, 17), (2, 8)),
 'writes': ('none', 'none', 'none')}
KINDS = ['chain', 'siblings']

if __name__ == "__main__":
    from tests.fuzz.run import replay

    replay(globals())
