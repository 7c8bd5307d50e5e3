"""Searching for columns: C++ against torch, where scores tie, are infinite or end in a tail, and without a compiler."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch

from vnm_compile.native import columns as native
from vnm_compile.prune import columns
from vnm_compile.prune.columns import column_value
from vnm_compile.prune.project import project

BLOCKS = [(1, 1, 5), (37, 1, 8), (33, 16, 8), (5, 100, 16), (130, 64, 6), (2, 3, 12), (0, 16, 8)]


def scores_of(shape, kind, dtype=torch.float32):
    scores = torch.rand(shape, dtype=dtype)
    return {
        "random": scores,
        "ties": (3 * scores).round(),
        "zeros": torch.zeros_like(scores),
        "infinite": torch.where(scores > 0.9, torch.inf, scores),
        "tiny": scores * torch.finfo(dtype).tiny,
        "huge": scores * torch.finfo(dtype).max / 1e6,
    }[kind]


@pytest.mark.parametrize("kind", ["random", "ties", "zeros", "infinite", "tiny", "huge"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", BLOCKS)
def test_all_choices_in_cpp(shape, dtype, kind):
    scores = scores_of(shape, kind, dtype)
    for n in (1, 2):
        found = native.best_columns(scores, n)
        assert found.dtype == torch.int64
        assert found.shape == (shape[0], 4)
        assert bool((found.diff(dim=1) > 0).all())
        values = torch.stack(
            [
                column_value(scores, torch.tensor([four] * len(scores)).view(-1, 4), n)
                for four in combinations(range(shape[2]), 4)
            ]
        )
        torch.testing.assert_close(column_value(scores, found, n), values.max(0).values, rtol=1e-6, atol=0)
        if kind in ("ties", "zeros"):  # sums are exact: the first of the best, as in torch
            assert torch.equal(found, columns._try_all(scores, n))


@pytest.mark.parametrize("kind", ["random", "ties", "zeros", "tiny", "huge"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("shape", "n", "width"),
    [((9, 16, 20), 2, 4), ((1, 1, 33), 1, 4), ((7, 64, 64), 16, 32), ((20, 100, 8), 3, 4), ((3, 5, 12), 7, 9)],
)
def test_growing_in_cpp(shape, n, width, dtype, kind):
    scores = scores_of(shape, kind, dtype)
    found, expected = native.grow_columns(scores, n, width), columns._grow(scores, n, width)
    assert bool((found.diff(dim=1) > 0).all())
    assert bool(((found >= 0) & (found < shape[2])).all())
    ours, theirs = column_value(scores, found, n), column_value(scores, expected, n)
    torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=0)  # another local optimum where sums nearly tie
    assert bool(ours.double().mean() >= 0.999 * theirs.double().mean())
    if kind in ("ties", "zeros"):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("spec", ["64:2:8", "16:1:16", "32:2:20", "100:2:6"])
def test_masks_of_large_weights_are_as_good_as_those_of_torch(spec, monkeypatch):
    scores = torch.rand(300, 517)
    assert columns._runs_native(scores)
    ours = project(scores, spec)
    monkeypatch.setattr(columns, "_NATIVE_FROM", 1 << 40)
    theirs = project(scores, spec)
    assert float((ours != theirs).float().mean()) < 1e-3
    torch.testing.assert_close((scores * ours).sum(), (scores * theirs).sum(), rtol=1e-5, atol=0)


def test_strided_scores_and_such_that_require_gradients():
    base = torch.rand(16, 40, 33)
    scores = base[:, ::2, 1:].transpose(1, 2).requires_grad_()
    assert torch.equal(native.best_columns(scores[..., :8], 2), native.best_columns(scores[..., :8].clone(), 2))


def test_without_a_compiler_torch_searches_and_says_so(monkeypatch):
    def broken():
        raise RuntimeError("no compiler is here\nand more")

    scores = torch.rand(256, 512)
    expected = project(scores, "64:2:8")
    monkeypatch.setattr(native, "build", broken)
    columns._compiles.cache_clear()
    try:
        with pytest.warns(UserWarning, match="no compiler is here"):
            found = project(scores, "64:2:8")
        project(scores, "64:2:8")  # told once
    finally:
        columns._compiles.cache_clear()
    torch.testing.assert_close((scores * found).sum(), (scores * expected).sum(), rtol=1e-6, atol=0)


def test_half_precision_is_searched_in_single():
    scores = torch.rand(256, 512).to(torch.bfloat16)
    assert torch.equal(project(scores, "64:2:8"), project(scores.float(), "64:2:8"))
