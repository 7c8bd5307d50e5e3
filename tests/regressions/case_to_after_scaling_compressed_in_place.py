# seed 4100749: raises at call 7
#              ^^^^^^^^^^^^^^^^^^^^
#     File "/work/main/.venv/lib/python3.11/site-packages/torch/nn/modules/module.py", line 990, in _apply
#       raise RuntimeError(
#   RuntimeError: _apply(): Couldn't swap Model.w1_0
#   {'seed': 4100749, 'width': 24, 'dtype': 'bfloat16', 'mode': 'no_grad', 'autocast': 'none', 'dynamic': True, 'storage': 'compressed', 'annotated': True, 'merge': False, 'through': 'fx', 'frozen': False, 'flat': False, 'input': 'transposed', 'calls': ((3, 8), (3, 2), (3, 2), (1, 2), (3, 3), (4, 0), (3, 1), (1, 2)), 'writes': ('none', 'none', 'none', 'none', 'none', 'none', 'round_trip')}
#   # weight_written
#   with torch.no_grad():
#       self.w1_0.copy_(self.w1_0 * 0.75)
#   t = F.linear(input=h, weight=self.w1_0)
#   u = F.linear(e, self.w1_0)
#   h = torch.tanh(t) + u
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

F32, BF16 = torch.float32, torch.bfloat16

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.w1_0 = nn.Parameter(torch.zeros(24, 24))

    def forward(self, x, flag=True):
        h, e, outs = x * 1, x, []
        # weight_written
        with torch.no_grad():
            self.w1_0.copy_(self.w1_0 * 0.75)
        t = F.linear(input=h, weight=self.w1_0)
        u = F.linear(e, self.w1_0)
        h = torch.tanh(t) + u
        return [h, *outs]

WEIGHTS = [{'name': 'w1_0', 'form': 'param', 'out_features': 24, 'in_features': 24, 'bias': 'none', 'spec': '16:2:8'}]
SETTINGS = {'seed': 4100749,
 'width': 24,
 'dtype': 'bfloat16',
 'mode': 'no_grad',
 'autocast': 'none',
 'dynamic': True,
 'storage': 'compressed',
 'annotated': True,
 'merge': False,
 'through': 'fx',
 'frozen': False,
 'flat': False,
 'input': 'transposed',
 'calls': ((3, 8), (3, 2), (3, 2), (1, 2), (3, 3), (4, 0), (3, 1), (1, 2)),
 'writes': ('none', 'none', 'none', 'none', 'none', 'none', 'round_trip')}
KINDS = ['weight_written']

if __name__ == "__main__":
    from tests.fuzz.run import replay

    replay(globals())
