"""Second-order pruning of one layer: what its updates are worth, and inputs that say little."""

from __future__ import annotations

import pytest
import torch

import vnm_compile as vnm
from vnm_compile.prune import project
from vnm_compile.prune.calibration import output_error
from vnm_compile.prune.methods.second_order import second_order
from vnm_compile.spec import Spec


def inputs_like_a_layers(tokens=2000, width=64, seed=0):
    """Correlated inputs with channels of very different size, as those of a transformer are."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator) / 3 + torch.eye(width)
    scale = torch.rand(width, generator=generator).mul(3).exp()
    return torch.randn(tokens, width, generator=generator) @ mix * scale


@pytest.mark.parametrize("spec", ["16:2:8", "16:1:5", "32:2:20", "1:2:4"])
def test_second_order_beats_magnitude_on_held_out_inputs(spec):
    spec = Spec.parse(spec)
    torch.manual_seed(0)
    weight, x = torch.randn(48, 64), inputs_like_a_layers()
    fitted, held_out = x[:1500].T @ x[:1500] / 1500, x[1500:].T @ x[1500:] / 500
    pruned = second_order(weight, fitted, spec)
    assert vnm.matches(pruned, spec)
    magnitude = output_error(weight, weight * project(weight.abs(), spec), held_out)
    wanda = output_error(weight, weight * project(weight.abs() * fitted.diagonal().sqrt(), spec), held_out)
    found = output_error(weight, pruned, held_out)
    assert found < 0.8 * magnitude
    assert found < wanda


def test_second_order_is_no_worse_than_sparsegpt_at_2_of_4():
    """Against a plain SparseGPT, written here from its paper: column by column, saliency of single weights."""
    torch.manual_seed(1)
    weight, x = torch.randn(48, 64), inputs_like_a_layers(seed=1)
    moment = x.T @ x / len(x)
    h = moment + 0.01 * moment.diagonal().mean() * torch.eye(64)
    upper = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    w = weight.clone()
    for j in range(64):
        if j % 4 == 0:
            saliency = (w[:, j : j + 4] / upper.diagonal()[j : j + 4]).square()
            keep = torch.zeros_like(saliency, dtype=torch.bool).scatter_(1, saliency.topk(2, 1).indices, True)
        error = torch.where(keep[:, j % 4], 0.0, w[:, j]) / upper[j, j]
        w[:, j:] -= error.unsqueeze(1) * upper[j, j:]
        w[:, j] = torch.where(keep[:, j % 4], w[:, j], 0.0)
    ours = second_order(weight, moment, Spec(1, 2, 4))
    assert output_error(weight, ours, moment) < output_error(weight, w, moment)


def test_dead_inputs_and_singular_moments():
    torch.manual_seed(0)
    x = torch.randn(10, 32)  # fewer tokens than inputs
    x[:, 5] = 0
    pruned = second_order(torch.randn(16, 32), x.T @ x / 10, Spec(16, 2, 8))
    assert pruned.isfinite().all()
    assert bool((pruned[:, 5] == 0).all())
    assert second_order(torch.randn(16, 32), torch.zeros(32, 32), Spec(16, 2, 8)).isfinite().all()


def test_dead_inputs_do_not_change_what_the_others_get():
    """However small the live inputs are, damping is a share of them and not of the dead ones."""
    torch.manual_seed(0)
    weight, x = torch.randn(16, 32), inputs_like_a_layers(width=32)
    x[:, ::2] = 0
    large, small = (second_order(weight, s * s * (x.T @ x) / len(x), Spec(16, 2, 8)) for s in (1.0, 1e-2))
    torch.testing.assert_close(small, large, atol=1e-3, rtol=1e-3)
