"""V:N:M-sparse transformers, fast, through torch.compile.

import vnm_compile as vnm

vnm.annotate(model, "64:2:8")
model = torch.compile(model, backend="vnm")
"""

import vnm_compile.native.gradients
import vnm_compile.tensor_ops  # noqa: F401 (gives VNMTensor its ops)
from vnm_compile.annotate import annotate
from vnm_compile.backend import refresh
from vnm_compile.checkpoint import load, save
from vnm_compile.convert import compress_model, decompress_model
from vnm_compile.errors import VNMError
from vnm_compile.explanation import explain
from vnm_compile.format import detect, matches
from vnm_compile.inspection import inspect
from vnm_compile.prune import sparsify
from vnm_compile.selection import select_spec
from vnm_compile.spec import Spec
from vnm_compile.tensor import VNMTensor, compress
from vnm_compile.train import finalize

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
    "refresh",
    "save",
    "select_spec",
    "sparsify",
]
