"""Making a model V:N:M: which weights to keep, and what to do to those that stay."""

from vnm_compile.prune.fisher import Fisher
from vnm_compile.prune.outcome import LayerLeft, LayerPruned
from vnm_compile.prune.project import project
from vnm_compile.prune.sparsify import METHODS, sparsify
from vnm_compile.prune.sparsify_report import SparsifyReport

__all__ = ["METHODS", "Fisher", "LayerLeft", "LayerPruned", "SparsifyReport", "project", "sparsify"]
