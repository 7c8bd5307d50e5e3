"""Second-order pruning of one layer: which weights to drop, and how those that stay make up for them.

The layer's output changes least, in the mean square over its calibration inputs, if `tr(dW H dWᵀ)` is small, H being
the inputs' second moment. Two steps:

- the mask is found by the alternating direction method of multipliers (ADMM): a dense W that minimises the error and a
  D that follows the pattern are pulled together ever harder, until D's support moves no more. All weights of a row take
  part in every step, where the group-by-group scheme of SparseGPT (arXiv 2301.00774) decides on a group once;
- on this mask, the kept weights are solved for by conjugate gradients.

Source: ALPS, NeurIPS 2024 (arXiv 2406.07831), sections 3 and 4, with the V:N:M projection in the unstructured one's
place. The penalty rises more slowly than there, which finds better masks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vnm_compile.errors import BadOption
from vnm_compile.layers import Layer
from vnm_compile.prune.calibration import output_error
from vnm_compile.prune.methods.layer_by_layer import LayerMethod
from vnm_compile.prune.project import project
from vnm_compile.prune.pruned import Pruned
from vnm_compile.spec import Spec

DAMPING = 0.01
POLISH_STEPS = 30
_FIRST_PENALTY = 0.1
_CHECK_EVERY = 3  # steps between two looks at how far the support has moved
_MOST_STEPS = 500
# Factors of the penalty where more than a share of the support has moved since the last look; it ends when none has.
_PENALTY_GROWTH = ((0.1, 1.08), (0.005, 1.05), (0.0, 1.03))


@dataclass(frozen=True)
class SecondOrder(LayerMethod):
    """Change the layers' outputs least, and let the weights that stay make up for those that go (see above).

    Attributes:
        damping: of the second moments, as a share of their mean diagonal.
        sequential: prune a block on the inputs that the blocks pruned before it produce, which keeps the whole model
            closer to the dense one; False: on those of the dense model, which keeps each layer closer to itself.
    """

    damping: float = DAMPING
    sequential: bool = True

    name: ClassVar[str] = "second_order"
    summary: ClassVar[str] = "change the layers' outputs least, and make up for what is dropped; needs calibration data"

    def __post_init__(self) -> None:
        if not isinstance(self.damping, int | float) or not 0 <= self.damping < float("inf"):
            raise BadOption(
                f"SecondOrder(damping={self.damping!r}): it is a share of the mean diagonal, such as {DAMPING}."
            )

    @property
    def on_pruned_inputs(self) -> bool:
        """As `sequential` says."""
        return self.sequential

    def prune_layer(self, layer: Layer, spec: Spec, moment: Tensor | None) -> Pruned:
        """Prune one layer by its weight and the second moment."""
        assert moment is not None, "it needs calibration data"
        weight = layer.weight.detach()
        new = second_order(weight, moment, spec, self.damping)
        return Pruned.of(layer, spec, new, weight, output_error(weight, new, moment))


def second_order(
    weight: Tensor, moment: Tensor, spec: Spec, damping: float = DAMPING, polish: int = POLISH_STEPS
) -> Tensor:
    """Return a weight that follows `spec` and changes the layer's output as little as may be.

    Args:
        weight: `[O, K]` floating point.
        moment: `[K, K]` float32, the mean of `x xᵀ` over the layer's inputs.
        spec: the pattern.
        damping: of the second moment, as a share of its mean diagonal.
        polish: steps of conjugate gradients on the fixed mask.

    Returns:
        `[O, K]`, dtype of `weight`.
    """
    w, h = weight.detach().float().clone(), moment.float().clone()
    dead = h.diagonal() == 0
    w[:, dead] = 0.0  # an input that is always zero needs no weight
    # Dead inputs take no part in the damping: it is a share of what the live ones bring.
    mean = h.diagonal()[~dead].mean() if bool((~dead).any()) else h.new_ones(())
    h.diagonal()[dead] = mean
    h.diagonal().add_(damping * mean)
    # With every input scaled to one, a weight's size says what it is worth, and one penalty suits all columns.
    scale = h.diagonal().sqrt()
    scaled = h / scale / scale.unsqueeze(1)
    found, mask = _admm(w * scale, scaled, spec)
    return (_solve_on_mask(w * scale, found, mask, scaled, polish) / scale).to(weight.dtype)


def _admm(target: Tensor, h: Tensor, spec: Spec) -> tuple[Tensor, Tensor]:
    """Minimise `tr((W - target) H (W - target)ᵀ)` over W = D, D following `spec`; returns D and its mask."""
    eigenvalues, basis = torch.linalg.eigh(h.double())
    eigenvalues, basis = eigenvalues.clamp_min(0).float(), basis.float()
    pull = target @ basis * eigenvalues  # target H, in H's basis
    d, multiplier = target, torch.zeros_like(target)
    penalty = _FIRST_PENALTY
    mask = looked_at = project(target.square(), spec)
    for step in range(1, _MOST_STEPS + 1):
        w = (pull + (penalty * d - multiplier) @ basis) / (eigenvalues + penalty) @ basis.T
        shifted = w + multiplier / penalty
        mask = project(shifted.square(), spec)
        d = shifted * mask
        multiplier = multiplier + penalty * (w - d)
        if step % _CHECK_EVERY == 0:
            moved = float((mask != looked_at).sum() / (2 * mask.sum()).clamp_min(1))
            if moved == 0:
                break
            penalty *= next(factor for share, factor in _PENALTY_GROWTH if moved > share)
            looked_at = mask
    return d, mask


def _solve_on_mask(dense: Tensor, start: Tensor, mask: Tensor, h: Tensor, steps: int) -> Tensor:
    """Minimise `tr((W - dense) H (W - dense)ᵀ)` over W that is zero outside `mask`, from `start`.

    Conjugate gradients, all rows at once; the diagonal of H is one.
    """
    w = start * mask
    residual = ((dense - w) @ h) * mask
    direction, energy = residual, residual.square().sum(1, keepdim=True)
    for _ in range(steps):
        curved = (direction @ h) * mask
        length = energy / (direction * curved).sum(1, keepdim=True).clamp_min(1e-30)
        w = w + length * direction
        residual = residual - length * curved
        previous, energy = energy, residual.square().sum(1, keepdim=True)
        direction = residual + energy / previous.clamp_min(1e-30) * direction
    return w
