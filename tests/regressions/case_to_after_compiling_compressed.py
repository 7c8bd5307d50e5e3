# seed 6023: raises at call 2
#       module._apply(fn)
#       raise RuntimeError(
#   RuntimeError: _apply(): Couldn't swap Linear.weight
#   {'seed': 6023, 'width': 32, 'dtype': 'float32', 'mode': 'train', 'autocast': 'none', 'dynamic': True, 'storage': 'compressed', 'annotated': False, 'merge': True, 'through': 'aot', 'frozen': False, 'flat': False, 'input': 'contiguous', 'calls': ((2, 1), (2, 17), (4, 0), (2, 33), (4, 2), (2, 2), (2, 3)), 'writes': ('none', 'round_trip', 'data_copy', 'none', 'compressed_values', 'compile_again')}
#   # branch
#   if flag:
#       h = h + self.w0_0(h)
#   else:
#       h = torch.tanh(self.w0_1(h))
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

F32, BF16 = torch.float32, torch.bfloat16

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.w0_0 = nn.Linear(32, 32, bias=True)
        self.w0_1 = nn.Linear(32, 32, bias=True)

    def forward(self, x, flag=True):
        h, e, outs = x * 1, x, []
        # branch
        if flag:
            h = h + self.w0_0(h)
        else:
            h = torch.tanh(self.w0_1(h))
        return [h, *outs]

WEIGHTS = [{'name': 'w0_0', 'form': 'linear', 'out_features': 32, 'in_features': 32, 'bias': 'row', 'spec': '64:2:8'},
 {'name': 'w0_1', 'form': 'linear', 'out_features': 32, 'in_features': 32, 'bias': 'row', 'spec': '64:2:8'}]
SETTINGS = {'seed': 6023,
 'width': 32,
 'dtype': 'float32',
 'mode': 'train',
 'autocast': 'none',
 'dynamic': True,
 'storage': 'compressed',
 'annotated': False,
 'merge': True,
 'through': 'aot',
 'frozen': False,
 'flat': False,
 'input': 'contiguous',
 'calls': ((2, 1), (2, 17), (4, 0), (2, 33), (4, 2), (2, 2), (2, 3)),
 'writes': ('none', 'round_trip', 'data_copy', 'none', 'compressed_values', 'compile_again')}
KINDS = ['branch']

if __name__ == "__main__":
    from tests.fuzz.run import replay

    replay(globals())
