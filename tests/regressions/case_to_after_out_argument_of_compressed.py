# seed 4100471: raises at call 1
#              ^^^^^^^^^^^^^^^^^^^^
#     File "/work/main/.venv/lib/python3.11/site-packages/torch/nn/modules/module.py", line 990, in _apply
#       raise RuntimeError(
#   RuntimeError: _apply(): Couldn't swap Model.w0_0
#   {'seed': 4100471, 'width': 40, 'dtype': 'float32', 'mode': 'no_grad', 'autocast': 'none', 'dynamic': None, 'storage': 'compressed', 'annotated': False, 'merge': True, 'through': 'fx', 'frozen': False, 'flat': False, 'input': 'contiguous', 'calls': ((2, 8), (1, 33)), 'writes': ('round_trip',)}
#   # out_argument
#   t = torch.empty_like(h)
#   torch.matmul(h, self.w0_0.t(), out=t)
#   h = t + e
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

F32, BF16 = torch.float32, torch.bfloat16

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.w0_0 = nn.Parameter(torch.zeros(40, 40))

    def forward(self, x, flag=True):
        h, e, outs = x * 1, x, []
        # out_argument
        t = torch.empty_like(h)
        torch.matmul(h, self.w0_0.t(), out=t)
        h = t + e
        return [h, *outs]

WEIGHTS = [{'name': 'w0_0', 'form': 'param', 'out_features': 40, 'in_features': 40, 'bias': 'none', 'spec': '16:1:8'}]
SETTINGS = {'seed': 4100471,
 'width': 40,
 'dtype': 'float32',
 'mode': 'no_grad',
 'autocast': 'none',
 'dynamic': None,
 'storage': 'compressed',
 'annotated': False,
 'merge': True,
 'through': 'fx',
 'frozen': False,
 'flat': False,
 'input': 'contiguous',
 'calls': ((2, 8), (1, 33)),
 'writes': ('round_trip',)}
KINDS = ['out_argument']

if __name__ == "__main__":
    from tests.fuzz.run import replay

    replay(globals())
