# seed 1011: wrong at call 0
#   output 0: value: error 6.71e+22, eager's is 1.59e-07, magnitude 2.43
#   {'seed': 1011, 'width': 32, 'dtype': 'float32', 'mode': 'no_grad', 'autocast': 'none', 'dynamic': True, 'storage': 'dense', 'annotated': True, 'merge': True, 'through': 'aot', 'frozen': False, 'flat': False, 'input': 'contiguous', 'calls': ((2, 1), (2, 33), (2, 5), (2, 1), (1, 0), (2, 5)), 'writes': ('none', 'none', 'none', 'none', 'none')}
#   # out_argument
#   t = torch.empty_like(h)
#   torch.matmul(h, self.w1_0.t(), out=t)
#   h = t + e
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

F32, BF16 = torch.float32, torch.bfloat16

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.w1_0 = nn.Parameter(torch.zeros(32, 32))

    def forward(self, x, flag=True):
        h, e, outs = x * 1, x, []
        # out_argument
        t = torch.empty_like(h)
        torch.matmul(h, self.w1_0.t(), out=t)
        h = t + e
        return [h, *outs]

WEIGHTS = [{'name': 'w1_0', 'form': 'param', 'out_features': 32, 'in_features': 32, 'bias': 'none', 'spec': '64:2:8'}]
SETTINGS = {'seed': 1011,
 'width': 32,
 'dtype': 'float32',
 'mode': 'no_grad',
 'autocast': 'none',
 'dynamic': True,
 'storage': 'dense',
 'annotated': True,
 'merge': True,
 'through': 'aot',
 'frozen': False,
 'flat': False,
 'input': 'contiguous',
 'calls': ((2, 1), (2, 33), (2, 5), (2, 1), (1, 0), (2, 5)),
 'writes': ('none', 'none', 'none', 'none', 'none')}
KINDS = ['out_argument']

if __name__ == "__main__":
    from tests.fuzz.run import replay

    replay(globals())
