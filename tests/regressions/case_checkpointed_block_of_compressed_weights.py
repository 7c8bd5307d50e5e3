# seed 200184: wrong at call 0
#   x.grad: missing: ours is NoneType, eager's Tensor
#   {'seed': 200184, 'width': 24, 'dtype': 'float32', 'mode': 'input_grad', 'autocast': 'none', 'dynamic': None, 'storage': 'compressed', 'annotated': False, 'merge': True, 'through': 'fx', 'frozen': True, 'flat': False, 'input': 'contiguous', 'calls': ((2, 1),), 'writes': ()}
#   # checkpointed
#   def block(t):
#       u = F.linear(input=t, weight=self.w2_1, bias=self.w2_1_bias) * F.linear(t, weight=self.w2_2, bias=self.w2_2_bias)
#       return torch.addmm(self.w2_3_bias, (u).reshape(-1, 16), self.w2_3).view(*(u).shape[:-1], 24)
#   h = checkpoint(block, h, use_reentrant=False)
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

F32, BF16 = torch.float32, torch.bfloat16

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.w2_1 = nn.Parameter(torch.zeros(16, 24))
        self.w2_1_bias = nn.Parameter(torch.zeros([16]))
        self.w2_2 = nn.Parameter(torch.zeros(16, 24))
        self.w2_2_bias = nn.Parameter(torch.zeros([16]))
        self.w2_3 = nn.Parameter(torch.zeros(16, 24))
        self.w2_3_bias = nn.Parameter(torch.zeros([24]))

    def forward(self, x, flag=True):
        h, e, outs = x * 1, x, []
        # checkpointed
        def block(t):
            u = F.linear(input=t, weight=self.w2_1, bias=self.w2_1_bias) * F.linear(t, weight=self.w2_2, bias=self.w2_2_bias)
            return torch.addmm(self.w2_3_bias, (u).reshape(-1, 16), self.w2_3).view(*(u).shape[:-1], 24)
        h = checkpoint(block, h, use_reentrant=False)
        return [h, *outs]

WEIGHTS = [{'name': 'w2_1', 'form': 'param', 'out_features': 16, 'in_features': 24, 'bias': 'row', 'spec': '1:2:4'},
 {'name': 'w2_2', 'form': 'param', 'out_features': 16, 'in_features': 24, 'bias': 'row', 'spec': '64:2:8'},
 {'name': 'w2_3', 'form': 'conv1d', 'out_features': 24, 'in_features': 16, 'bias': 'row', 'spec': '8:2:16'}]
SETTINGS = {'seed': 200184,
 'width': 24,
 'dtype': 'float32',
 'mode': 'input_grad',
 'autocast': 'none',
 'dynamic': None,
 'storage': 'compressed',
 'annotated': False,
 'merge': True,
 'through': 'fx',
 'frozen': True,
 'flat': False,
 'input': 'contiguous',
 'calls': ((2, 1),),
 'writes': ()}
KINDS = ['checkpointed']

if __name__ == "__main__":
    from tests.fuzz.run import replay

    replay(globals())
