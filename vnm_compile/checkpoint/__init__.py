"""Models on disk: compressed weights as plain tensors in safetensors files, checked before anything is built of them.

`flat` says what the files hold, `files` reads and checks them, `directory` writes a directory whole or not at all;
`save` and `load` are what users call.
"""

from vnm_compile.checkpoint.load import load
from vnm_compile.checkpoint.save import save

__all__ = ["load", "save"]
