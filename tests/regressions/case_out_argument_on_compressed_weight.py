# seed 1016: raises at call 0
#     File "vnm_compile/tensor.py", line 119, in __torch_function__
#       result = handler(*args, **(kwargs or {}))
#                ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^
#   TypeError: _matmul() got an unexpected keyword argument 'out'
#   {'seed': 1016, 'width': 32, 'dtype': 'bfloat16', 'mode': 'no_grad', 'autocast': 'none', 'dynamic': True, 'storage': 'compressed', 'annotated': True, 'merge': True, 'through': 'fx', 'frozen': False, 'flat': False, 'input': 'expanded', 'calls': ((1, 1), (1, 17), (1, 3), (4, 1), (1, 0), (4, 0), (1, 1)), 'writes': ('none', 'none', 'none', 'none', 'none', 'none')}
#   # out_argument
#   t = torch.empty_like(h)
#   torch.matmul(h, self.w2_0.t(), out=t)
#   h = t + e
#   # siblings
#   a, b, c = self.w3_0(h), self.w3_1(h), self.w3_2(h)
#   outs.append(b.sum(-1))
#   h = torch.where(x > 0, a, c)
#   # siblings_written
#   h = h.clone()
#   a = self.w4_0(h)
#   h += e
#   b = self.w4_1(h)
#   h = a.sub(b)
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

F32, BF16 = torch.float32, torch.bfloat16

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.w2_0 = nn.Parameter(torch.zeros(32, 32))
        self.w3_0 = nn.Linear(32, 32, bias=True)
        self.w3_1 = nn.Linear(32, 24, bias=True)
        self.w3_2 = nn.Linear(32, 32, bias=True)
        self.w4_0 = nn.Linear(32, 32, bias=True)
        self.w4_1 = nn.Linear(32, 32, bias=True)

    def forward(self, x, flag=True):
        h, e, outs = x * 1, x, []
        # out_argument
        t = torch.empty_like(h)
        torch.matmul(h, self.w2_0.t(), out=t)
        h = t + e
        # siblings
        a, b, c = self.w3_0(h), self.w3_1(h), self.w3_2(h)
        outs.append(b.sum(-1))
        h = torch.where(x > 0, a, c)
        # siblings_written
        h = h.clone()
        a = self.w4_0(h)
        h += e
        b = self.w4_1(h)
        h = a.sub(b)
        return [h, *outs]

WEIGHTS = [{'name': 'w2_0', 'form': 'param', 'out_features': 32, 'in_features': 32, 'bias': 'none', 'spec': '8:2:8'},
 {'name': 'w3_0', 'form': 'linear', 'out_features': 32, 'in_features': 32, 'bias': 'row', 'spec': '8:2:8'},
 {'name': 'w3_1', 'form': 'linear', 'out_features': 24, 'in_features': 32, 'bias': 'row', 'spec': '8:2:8'},
 {'name': 'w3_2', 'form': 'linear', 'out_features': 32, 'in_features': 32, 'bias': 'row', 'spec': '8:2:8'},
 {'name': 'w4_0', 'form': 'linear', 'out_features': 32, 'in_features': 32, 'bias': 'row', 'spec': '8:2:8'},
 {'name': 'w4_1', 'form': 'linear', 'out_features': 32, 'in_features': 32, 'bias': 'row', 'spec': '8:2:8'}]
SETTINGS = {'seed': 1016,
 'width': 32,
 'dtype': 'bfloat16',
 'mode': 'no_grad',
 'autocast': 'none',
 'dynamic': True,
 'storage': 'compressed',
 'annotated': True,
 'merge': True,
 'through': 'fx',
 'frozen': False,
 'flat': False,
 'input': 'expanded',
 'calls': ((1, 1), (1, 17), (1, 3), (4, 1), (1, 0), (4, 0), (1, 1)),
 'writes': ('none', 'none', 'none', 'none', 'none', 'none')}
KINDS = ['out_argument', 'siblings', 'siblings_written']

if __name__ == "__main__":
    from tests.fuzz.run import replay

    replay(globals())
