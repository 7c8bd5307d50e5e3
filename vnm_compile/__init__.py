"""V:N:M-sparse transformers, fast, through torch.compile.

import vnm_compile as vnm

vnm.annotate(model, "64:2:8")
model = torch.compile(model, backend="vnm")
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

import vnm_compile.native.gradients
import vnm_compile.tensor_ops  # noqa: F401 (gives VNMTensor its ops)
from vnm_compile.annotate import annotate
from vnm_compile.checkpoint import load, save
from vnm_compile.convert import compress_model, decompress_model
from vnm_compile.errors import VNMError
from vnm_compile.format import detect, matches
from vnm_compile.prune import sparsify
from vnm_compile.quantizing import quantize
from vnm_compile.spec import Spec
from vnm_compile.tensor import VNMTensor, compress
from vnm_compile.train import finalize

if TYPE_CHECKING:
    from vnm_compile.backend import refresh
    from vnm_compile.explanation.explain import explain
    from vnm_compile.inspection.inspect import inspect
    from vnm_compile.selection.select import select_spec

__version__ = "0.1.0"

__all__ = [
    "Spec",
    "VNMError",
    "VNMTensor",
    "annotate",
    "compress",
    "compress_model",
    "decompress_model",
    "detect",
    "explain",
    "finalize",
    "inspect",
    "load",
    "matches",
    "quantize",
    "refresh",
    "save",
    "select_spec",
    "sparsify",
]

# What compiles needs Inductor, which takes as long to import as torch: it is, when one of these is first used.
_COMPILING = {
    "explain": "vnm_compile.explanation",
    "inspect": "vnm_compile.inspection",
    "refresh": "vnm_compile.backend",
    "select_spec": "vnm_compile.selection",
}


def __getattr__(name: str) -> Any:
    if name not in _COMPILING:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_COMPILING[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
