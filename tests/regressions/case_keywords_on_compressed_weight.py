# seed 108: raises at call 0
#     File "vnm_compile/tensor.py", line 119, in __torch_function__
#       result = handler(*args, **(kwargs or {}))
#                ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^
#   TypeError: _linear() got an unexpected keyword argument 'input'
#   {'seed': 108, 'width': 24, 'dtype': 'float32', 'mode': 'no_grad', 'autocast': 'none', 'dynamic': None, 'storage': 'compressed', 'annotated': False, 'merge': True, 'through': 'fx', 'frozen': False, 'flat': False, 'input': 'contiguous', 'calls': ((3, 17),), 'writes': ()}
#   # branch
#   if flag:
#       h = h + F.linear(input=h, weight=self.w0_0, bias=self.w0_0_bias)
#   else:
#       h = torch.tanh(((h) @ self.w0_1.T + self.w0_1_bias))
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

F32, BF16 = torch.float32, torch.bfloat16

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.w0_0 = nn.Parameter(torch.zeros(24, 24))
        self.w0_0_bias = nn.Parameter(torch.zeros([24]))
        self.w0_1 = nn.Parameter(torch.zeros(24, 24))
        self.w0_1_bias = nn.Parameter(torch.zeros([24]))

    def forward(self, x, flag=True):
        h, e, outs = x * 1, x, []
        # branch
        if flag:
            h = h + F.linear(input=h, weight=self.w0_0, bias=self.w0_0_bias)
        else:
            h = torch.tanh(((h) @ self.w0_1.T + self.w0_1_bias))
        return [h, *outs]

WEIGHTS = [{'name': 'w0_0', 'form': 'param', 'out_features': 24, 'in_features': 24, 'bias': 'row', 'spec': '16:1:8'},
 {'name': 'w0_1', 'form': 'param', 'out_features': 24, 'in_features': 24, 'bias': 'row', 'spec': '16:1:8'}]
SETTINGS = {'seed': 108,
 'width': 24,
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
 'calls': ((3, 17),),
 'writes': ()}
KINDS = ['branch']

if __name__ == "__main__":
    from tests.fuzz.run import replay

    replay(globals())
