# RuntimeError: Unexpected floating ScalarType in at::autocast::prioritize
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

F32, BF16 = torch.float32, torch.bfloat16

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.w0_0 = nn.Linear(24, 24, bias=True)

    def forward(self, x, flag=True):
        h, e, outs = x * 1, x, []
        # precisions
        t = self.w0_0(h).to(F32)
        outs.append(t)
        h = (h + t).to(h.dtype)
        return [h, *outs]

WEIGHTS = [{'name': 'w0_0', 'form': 'linear', 'out_features': 24, 'in_features': 24, 'bias': 'row', 'spec': '16:1:8'}]
SETTINGS = {'seed': 0,
 'width': 24,
 'dtype': 'float16',
 'mode': 'no_grad',
 'autocast': 'bfloat16',
 'dynamic': None,
 'storage': 'dense',
 'annotated': False,
 'merge': True,
 'through': 'fx',
 'frozen': True,
 'flat': False,
 'input': 'contiguous',
 'calls': ((2, 5), (2, 8)),
 'writes': ()}
KINDS = ['precisions']

if __name__ == "__main__":
    from tests.fuzz.run import replay

    replay(globals())
