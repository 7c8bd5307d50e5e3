"""The mask that keeps the most: against every choice, at the tails, and where not every choice is tried."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vnm_compile as vnm
from vnm_compile.prune.columns import column_value, columns_of
from vnm_compile.prune.project import project
from vnm_compile.spec import Spec


def best_value(block, n):
    """The largest sum that a block [V, M] can keep, by trying everything."""
    m = block.shape[1]
    return max(block[:, list(c)].topk(n, dim=1).values.sum().item() for c in combinations(range(m), 4))


@settings(max_examples=40, deadline=None)
@given(m=st.integers(4, 16), v=st.sampled_from([1, 4, 16]), n=st.sampled_from([1, 2]), seed=st.integers(0, 999))
def test_the_mask_of_a_block_is_the_best_one(m, v, n, seed):
    scores = torch.rand(v, m, generator=torch.Generator().manual_seed(seed))
    mask = project(scores, Spec(v, n, m))
    assert torch.isclose((scores * mask).sum(), torch.tensor(best_value(scores, n)), rtol=1e-5)
    assert bool((mask.sum(1) == n).all())


@pytest.mark.parametrize(("out", "width", "spec"), [(70, 45, "16:2:7"), (33, 100, "32:1:40"), (5, 6, "128:2:5")])
def test_masks_follow_the_pattern_at_the_tails(out, width, spec):
    scores = torch.rand(out, width)
    assert vnm.matches(project(scores, spec).float(), spec)


def test_wide_groups_are_never_worse_than_greedy_and_close_to_exact():
    blocks = torch.rand(50, 16, 14)
    for n in (1, 2):
        exact = column_value(blocks, columns_of(blocks, n, 4, "try"), n)
        found = column_value(blocks, columns_of(blocks, n, 4, "grow"), n)
        assert bool((found <= exact * (1 + 1e-5)).all())
        assert float((found / exact).mean()) > 0.995
