# seed 300132: raises at call 0
#       stored = self.__dict__.get("_stored")
#                ^^^^^^^^^^^^^^^^^^^^^^^^^^^^
#   
#   Set TORCHDYNAMO_VERBOSE=1 for the internal stack trace (please do this especially if you're reporting a bug to PyTorch). For even more developer context, set TORCH_LOGS="+dynamo"
#   {'seed': 300132, 'width': 24, 'dtype': 'float32', 'mode': 'inference', 'autocast': 'none', 'dynamic': True, 'storage': 'compressed', 'annotated': False, 'merge': True, 'through': 'aot', 'frozen': False, 'flat': False, 'input': 'offset', 'calls': ((1, 3), (1, 8), (1, 0), (1, 5), (4, 5), (1, 0)), 'writes': ('none', 'none', 'none', 'none', 'none')}
#   # weight_written
#   t = F.linear(h, self.w2_0)
#   with torch.no_grad():
#       self.w2_0.copy_(self.w2_0 * 0.75)
#   u = torch.matmul(e, self.w2_0.t())
#   h = torch.tanh(t) + u
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

F32, BF16 = torch.float32, torch.bfloat16

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.w2_0 = nn.Parameter(torch.zeros(24, 24))

    def forward(self, x, flag=True):
        h, e, outs = x * 1, x, []
        # weight_written
        t = F.linear(h, self.w2_0)
        with torch.no_grad():
            self.w2_0.copy_(self.w2_0 * 0.75)
        u = torch.matmul(e, self.w2_0.t())
        h = torch.tanh(t) + u
        return [h, *outs]

WEIGHTS = [{'name': 'w2_0', 'form': 'param', 'out_features': 24, 'in_features': 24, 'bias': 'none', 'spec': '1:1:4'}]
SETTINGS = {'seed': 300132,
 'width': 24,
 'dtype': 'float32',
 'mode': 'inference',
 'autocast': 'none',
 'dynamic': True,
 'storage': 'compressed',
 'annotated': False,
 'merge': True,
 'through': 'aot',
 'frozen': False,
 'flat': False,
 'input': 'offset',
 'calls': ((1, 3), (1, 8), (1, 0), (1, 5), (4, 5), (1, 0)),
 'writes': ('none', 'none', 'none', 'none', 'none')}
KINDS = ['weight_written']

if __name__ == "__main__":
    from tests.fuzz.run import replay

    replay(globals())
