# seed 100080: raises at call 1
#              ^^^^^^^^^^^^^^^^^^^^
#       raise RuntimeError(
#   RuntimeError: _apply(): Couldn't swap Model.w3_0
#   {'seed': 100080, 'width': 40, 'dtype': 'float32', 'mode': 'no_grad', 'autocast': 'none', 'dynamic': None, 'storage': 'compressed', 'annotated': False, 'merge': True, 'through': 'aot', 'frozen': False, 'flat': False, 'input': 'contiguous', 'calls': ((3, 3), (3, 33)), 'writes': ('round_trip',)}
#   # gated
#   t = F.silu(torch.mm((h).reshape(-1, 40), self.w3_0.t()).view(*(h).shape[:-1], 24)) * ((h) @ self.w3_1.T)
#   h = F.layer_norm(h + torch.addmm(self.w3_2_bias, (t).reshape(-1, 24), self.w3_2).view(*(t).shape[:-1], 40), (40,))
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

F32, BF16 = torch.float32, torch.bfloat16

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.w3_0 = nn.Parameter(torch.zeros(24, 40))
        self.w3_1 = nn.Parameter(torch.zeros(24, 40))
        self.w3_2 = nn.Parameter(torch.zeros(24, 40))
        self.w3_2_bias = nn.Parameter(torch.zeros([40]))

    def forward(self, x, flag=True):
        h, e, outs = x * 1, x, []
        # gated
        t = F.silu(torch.mm((h).reshape(-1, 40), self.w3_0.t()).view(*(h).shape[:-1], 24)) * ((h) @ self.w3_1.T)
        h = F.layer_norm(h + torch.addmm(self.w3_2_bias, (t).reshape(-1, 24), self.w3_2).view(*(t).shape[:-1], 40), (40,))
        return [h, *outs]

WEIGHTS = [{'name': 'w3_0', 'form': 'param', 'out_features': 24, 'in_features': 40, 'bias': 'none', 'spec': '32:2:5'},
 {'name': 'w3_1', 'form': 'param', 'out_features': 24, 'in_features': 40, 'bias': 'none', 'spec': '32:2:5'},
 {'name': 'w3_2', 'form': 'conv1d', 'out_features': 40, 'in_features': 24, 'bias': 'row', 'spec': '32:2:5'}]
SETTINGS = {'seed': 100080,
 'width': 40,
 'dtype': 'float32',
 'mode': 'no_grad',
 'autocast': 'none',
 'dynamic': None,
 'storage': 'compressed',
 'annotated': False,
 'merge': True,
 'through': 'aot',
 'frozen': False,
 'flat': False,
 'input': 'contiguous',
 'calls': ((3, 3), (3, 33)),
 'writes': ('round_trip',)}
KINDS = ['gated']

if __name__ == "__main__":
    from tests.fuzz.run import replay

    replay(globals())
