# seed 100007: raises at call 8
#       module._apply(fn)
#       raise RuntimeError(
#   RuntimeError: _apply(): Couldn't swap Linear.weight
#   {'seed': 100007, 'width': 24, 'dtype': 'float16', 'mode': 'input_grad', 'autocast': 'none', 'dynamic': True, 'storage': 'compressed', 'annotated': True, 'merge': True, 'through': 'inductor', 'frozen': True, 'flat': False, 'input': 'contiguous', 'calls': ((2, 3), (2, 17), (1, 3), (2, 5), (1, 0), (2, 3), (2, 0), (1, 33), (1, 0)), 'writes': ('none', 'none', 'none', 'none', 'none', 'none', 'none', 'round_trip')}
#   # rows
#   t = self.w1_0(x[-1])
#   h = h + t
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

F32, BF16 = torch.float32, torch.bfloat16

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.w1_0 = nn.Linear(24, 24, bias=True)

    def forward(self, x, flag=True):
        h, e, outs = x * 1, x, []
        # rows
        t = self.w1_0(x[-1])
        h = h + t
        return [h, *outs]

WEIGHTS = [{'name': 'w1_0', 'form': 'linear', 'out_features': 24, 'in_features': 24, 'bias': 'row', 'spec': '64:2:8'}]
SETTINGS = {'seed': 100007,
 'width': 24,
 'dtype': 'float16',
 'mode': 'input_grad',
 'autocast': 'none',
 'dynamic': True,
 'storage': 'compressed',
 'annotated': True,
 'merge': True,
 'through': 'inductor',
 'frozen': True,
 'flat': False,
 'input': 'contiguous',
 'calls': ((2, 3), (2, 17), (1, 3), (2, 5), (1, 0), (2, 3), (2, 0), (1, 33), (1, 0)),
 'writes': ('none', 'none', 'none', 'none', 'none', 'none', 'none', 'round_trip')}
KINDS = ['rows']

if __name__ == "__main__":
    from tests.fuzz.run import replay

    replay(globals())
