"""The masks of the bound are at least as free as V:N:M, and as dense."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from benchmarks.permutation_bound import MASKS, SPEC, free_columns, vnm_mask


@pytest.mark.parametrize("name", MASKS)
def test_every_mask_keeps_a_quarter_and_no_less_than_the_pattern(name):
    weight = torch.randn(2 * SPEC.v, 64)
    mask, pattern = MASKS[name](weight), vnm_mask(weight)
    assert (mask.sum(1) == 16).all()
    assert (weight * mask).abs().sum() >= (weight * pattern).abs().sum()


def test_a_block_keeps_half_of_its_columns():
    weight = torch.randn(SPEC.v, 64)
    assert len(set(free_columns(weight.abs()).tolist())) == 32
    assert MASKS["columns free"](weight).any(0).sum() <= 32
