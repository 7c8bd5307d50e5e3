# output 2: dtype: torch.float32, eager's torch.bfloat16
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

F32, BF16 = torch.float32, torch.bfloat16

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.w1_0 = nn.Linear(40, 40, bias=True)
        self.w1_1 = nn.Linear(40, 40, bias=True)

    def forward(self, x, flag=True):
        h, e, outs = x * 1, x, []
        # regions
        a = self.w1_0(h)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            b = self.w1_1(h)
        outs += [a, b]
        h = (a.to(h.dtype) + b.to(h.dtype)) * 0.5
        return [h, *outs]

WEIGHTS = [{'name': 'w1_0', 'form': 'linear', 'out_features': 40, 'in_features': 40, 'bias': 'row', 'spec': '64:2:8'},
 {'name': 'w1_1', 'form': 'linear', 'out_features': 40, 'in_features': 40, 'bias': 'row', 'spec': '64:2:8'}]
SETTINGS = {'seed': 0,
 'width': 40,
 'dtype': 'float32',
 'mode': 'no_grad',
 'autocast': 'none',
 'dynamic': True,
 'storage': 'dense',
 'annotated': False,
 'merge': True,
 'through': 'fx',
 'frozen': True,
 'flat': False,
 'input': 'contiguous',
 'calls': ((2, 5), (1, 3)),
 'writes': ()}
KINDS = ['regions']

if __name__ == "__main__":
    from tests.fuzz.run import replay

    replay(globals())
