"""Searching for columns: C++ against torch, where scores tie, are infinite or end in a tail, and without a compiler."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch

from vnm_compile.errors import BadScores
from vnm_compile.native import columns as native
from vnm_compile.prune import columns
from vnm_compile.prune.columns import column_value, way
from vnm_compile.prune.project import project, project_columns

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
        found = native.columns_of(scores, n, 4, "try")
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
    found, expected = native.columns_of(scores, n, width, "grow"), columns._grow(scores, n, width)
    assert bool((found.diff(dim=1) > 0).all())
    assert bool(((found >= 0) & (found < shape[2])).all())
    ours, theirs = column_value(scores, found, n), column_value(scores, expected, n)
    torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=0)  # another local optimum where sums nearly tie
    assert bool(ours.double().mean() >= 0.999 * theirs.double().mean())
    if kind in ("ties", "zeros"):
        assert torch.equal(found, expected)


PATTERNS = [(64, 4, 2, 8), (16, 4, 1, 16), (32, 4, 2, 20), (100, 4, 2, 6), (8, 4, 3, 8), (64, 32, 16, 64), (8, 5, 5, 8)]
PATTERNS += [(1, 8, 2, 8), (512, 4, 2, 4), (16, 4, 4, 8)]


@pytest.mark.parametrize("kind", ["random", "ties", "zeros"])
@pytest.mark.parametrize(("v", "width", "n", "m"), PATTERNS)
def test_masks_in_cpp_are_as_good_as_those_of_torch(v, width, n, m, kind, monkeypatch):
    """With tails of rows and columns: N of each group of a row, in no more columns of a block than are kept."""
    scores = scores_of((300, 517), kind)
    assert columns.runs_native([scores])
    ours = project_columns(scores, v, width, n, m)
    monkeypatch.setattr(columns, "_NATIVE_FROM", 1 << 40)
    theirs = project_columns(scores, v, width, n, m)
    assert ours.dtype == torch.bool
    assert ours.is_contiguous()
    torch.testing.assert_close((scores * ours).sum(), (scores * theirs).sum(), rtol=1e-5, atol=0)
    for mask in (ours, theirs):
        groups = [part.sum(1) for part in mask.split(m, dim=1)]
        assert all(bool((each == n).all()) for each in groups[:-1])
        blocks = [block.any(0).sum() for rows in mask.split(v) for block in rows.split(m, dim=1)]
        assert max(int(each) for each in blocks) <= width
    if kind == "random" and way(n, width, m) != "grow":
        assert float((ours != theirs).float().mean()) < 1e-3


@pytest.mark.parametrize("spec", ["64:2:8", "16:2:20", "8:4:4"])
def test_nan_is_refused(spec):
    scores = torch.rand(256, 512)
    scores[200, 300] = torch.nan
    with pytest.raises(BadScores, match="NaN"):
        project_columns(scores, *((8, 4, 4, 8) if spec == "8:4:4" else (16, 4, 2, int(spec.split(":")[2]))))
    with pytest.raises(BadScores, match="NaN"):
        native.columns_of(scores.view(-1, 16, 8), 2, 4, "try")


def test_strided_scores_and_such_that_require_gradients():
    base = torch.rand(16, 40, 33)
    scores = base[:, ::2, 1:].transpose(1, 2).requires_grad_()
    some = scores[..., :8]
    assert torch.equal(native.columns_of(some, 2, 4, "try"), native.columns_of(some.clone(), 2, 4, "try"))
    matrix = torch.rand(64, 700)[:, 3:603].requires_grad_()
    assert torch.equal(project(matrix, "16:2:8"), project(matrix.detach().clone(), "16:2:8"))
    assert torch.equal(project(matrix.t(), "16:2:8"), project(matrix.t().contiguous(), "16:2:8"))


def test_another_default_device_and_scores_that_are_negated_when_read():
    scores = torch.rand(256, 512)
    expected = project(scores, "64:2:8")
    negated = torch._neg_view(-scores)
    assert negated.is_neg()
    assert torch.equal(project(negated, "64:2:8"), expected)
    with torch.device("meta"):
        found = project(scores, "64:2:8")
        columns_found = native.columns_of(scores.view(-1, 64, 8), 2, 4, "try")
    assert found.device.type == columns_found.device.type == "cpu"
    assert torch.equal(found, expected)
    assert torch.equal(columns_found, native.columns_of(scores.view(-1, 64, 8), 2, 4, "try"))


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


def test_scores_of_a_subclass_are_torchs_to_search():
    class Wrapped(torch.Tensor):
        pass

    scores = torch.rand(256, 512)
    wrapped = scores.as_subclass(Wrapped)
    assert not columns.runs_native([wrapped])
    assert columns.runs_native([torch.nn.Parameter(scores)])
    assert torch.equal(project(wrapped, "64:2:4"), project(scores, "64:2:4"))


def test_half_precision_is_searched_in_single():
    scores = torch.rand(256, 512).to(torch.bfloat16)
    assert torch.equal(project(scores, "64:2:8"), project(scores.float(), "64:2:8"))
