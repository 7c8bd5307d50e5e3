"""What several tests need: random sparse weights and float64 references."""

from __future__ import annotations

import shutil
from collections.abc import Container, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

from vnm_compile.spec import Spec

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def with_slow(values: Iterable[Any], quick: Container[Any]) -> list[Any]:
    """Values to parametrize with: those in `quick` in every run, the others, which repeat much of it, marked slow."""
    return [each if each in quick else pytest.param(each, marks=pytest.mark.slow) for each in values]


def random_sparse(
    out_features: int, in_features: int, spec: Spec | str, dtype: torch.dtype = torch.float32, seed: int = 0
) -> Tensor:
    """A random weight `[out_features, in_features]` that follows `spec`: kept columns and values drawn at random."""
    spec = Spec.parse(spec)
    generator = torch.Generator().manual_seed(seed)
    rows, groups = spec.rows(out_features), spec.groups(in_features)
    per_block = (rows // spec.v, spec.v, groups)
    columns = torch.rand(per_block[0], groups, spec.m, generator=generator).topk(4, -1).indices
    chosen = torch.rand(*per_block, 4, generator=generator).topk(spec.n, -1).indices
    offsets = columns.unsqueeze(1).expand(-1, spec.v, -1, -1).gather(3, chosen)
    values = torch.randn(*per_block, spec.n, generator=generator)
    dense = torch.zeros(*per_block, spec.m).scatter_(3, offsets, values)
    return dense.view(rows, groups * spec.m)[:out_features, :in_features].to(dtype).contiguous()


def make_sparse_(module: torch.nn.Module, spec: Spec | str, seed: int = 0) -> torch.nn.Module:
    """Give every nn.Linear of `module` a random weight that follows `spec`, scaled as it would be initialised."""
    for i, layer in enumerate(m for m in module.modules() if isinstance(m, torch.nn.Linear)):
        weight = random_sparse(layer.out_features, layer.in_features, spec, layer.weight.dtype, seed + i)
        with torch.no_grad():
            layer.weight.copy_(weight * layer.in_features**-0.5)
    return module


def assert_as_accurate_as_dense(actual: Tensor, dense: Tensor, reference: Tensor, slack: float = 1.1) -> None:
    """Promise 1: the error against float64 is at most `slack` times that of the dense kernel of the same dtype.

    An error is the norm of the differences of all elements. No kernel is asked for less than what rounding the exact
    result makes, which a dense one may undercut by luck, being exact. In two-byte dtypes both errors are that of
    rounding sums held in fp32, so nothing is allowed on top. In fp32 the order of additions makes them, independently,
    and their ratio scatters with the number of elements: by five over its root here. That no single element is far
    off, which a norm may hide, is checked by the largest difference: at most twice what the norms may be apart.
    """
    assert actual.dtype == dense.dtype
    assert actual.shape == dense.shape == reference.shape
    assert actual.isfinite().all()
    scatter = 5 * dense.numel() ** -0.5 if dense.dtype == torch.float32 and dense.numel() else 0.0
    rounded = reference.to(dense.dtype)
    for name, order, factor in (("norm", 2, 1), ("largest difference", torch.inf, 2)):
        ours, theirs, least = (
            float(torch.linalg.vector_norm(each.double() - reference, order)) for each in (actual, dense, rounded)
        )
        allowed = factor * slack * (1 + scatter) * max(theirs, least)
        assert ours <= allowed, f"{name} of the errors {ours:.3g}, the dense kernel's is {theirs:.3g}"
