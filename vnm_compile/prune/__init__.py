"""Making a model V:N:M: which weights to keep, and what to do to those that stay."""

from vnm_compile.prune.methods import METHODS, Fisher, LayerMethod, Magnitude, Method, SecondOrder, Wanda
from vnm_compile.prune.outcome import LayerLeft, LayerPruned
from vnm_compile.prune.project import project
from vnm_compile.prune.sparsify import sparsify
from vnm_compile.prune.sparsify_report import SparsifyReport

__all__ = [
    "METHODS",
    "Fisher",
    "LayerLeft",
    "LayerMethod",
    "LayerPruned",
    "Magnitude",
    "Method",
    "SecondOrder",
    "SparsifyReport",
    "Wanda",
    "project",
    "sparsify",
]
