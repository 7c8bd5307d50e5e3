"""Second-order pruning of one layer: which weights to drop, and how those that stay make up for them.

The layer's output changes least, in the mean square over its calibration inputs, if `tr(dW H dWᵀ)` is small, H being
the inputs' second moment. Columns are worked off group by group, as in SparseGPT (arXiv 2301.00774): what is pruned in
a group is made up for by the columns that are still open. Three things differ from it:

- a group is pruned jointly. For each row, every choice of N kept columns has an exact cost, that of the optimal brain
  surgeon with all M - N others removed at once (arXiv 2203.07259; VENOM, arXiv 2310.02065, section 5, with the Fisher
  in H's place), and of all C(M, 4) sets of columns the block takes the one with the least total over its rows;
- the kept columns of the group make up for the pruned ones too, not only those of later groups;
- at the end, the kept weights are solved for on the fixed mask, by conjugate gradients, as in ALPS (NeurIPS 2024).
"""

from __future__ import annotations

from itertools import combinations

import torch
from torch import Tensor

from vnm_compile.errors import VNMError
from vnm_compile.prune.project import EXACT_UP_TO, project
from vnm_compile.spec import KEPT_COLUMNS, Spec

DAMPING = 0.01
POLISH_STEPS = 30


def second_order(
    weight: Tensor, moment: Tensor, spec: Spec, damping: float = DAMPING, polish: int = POLISH_STEPS
) -> Tensor:
    """Return a weight that follows `spec` and changes the layer's output as little as may be.

    Args:
        weight: `[O, K]` floating point.
        moment: `[K, K]` float32, the mean of `x xᵀ` over the layer's inputs.
        spec: the pattern.
        damping: of the second moment, as a share of its mean diagonal; raised tenfold while the moment stays singular.
        polish: steps of conjugate gradients on the fixed mask.

    Returns:
        `[O, K]`, dtype of `weight`.
    """
    w, h = weight.detach().float().clone(), moment.float().clone()
    dead = h.diagonal() == 0
    w[:, dead] = 0.0  # an input that is always zero needs no weight
    # Dead inputs take no part in the damping: it is a share of what the live ones bring.
    mean = h.diagonal()[~dead].mean() if bool((~dead).any()) else torch.ones(())
    h.diagonal()[dead] = mean
    h.diagonal().add_(damping * mean)
    upper = _inverse_factor(h)
    mask = torch.zeros_like(w, dtype=torch.bool)
    open_weights = w.clone()
    for start in range(0, w.shape[1], spec.m):
        stop = min(start + spec.m, w.shape[1])
        group, factor = open_weights[:, start:stop], upper[start:stop, start:stop]
        kept, error = _prune_group(group, factor, spec)
        mask[:, start:stop] = kept
        open_weights[:, start:stop] = (group - error @ factor) * kept
        open_weights[:, stop:] -= error @ upper[start:stop, stop:]
    solved = _solve_on_mask(w, open_weights, mask, h, polish)
    return solved.to(weight.dtype)


def _inverse_factor(h: Tensor) -> Tensor:
    """The upper factor U with `UᵀU = H⁻¹`: of the columns from i on, the inverse is `U[i:, i:]ᵀ U[i:, i:]`."""
    matrix, damping = h.double(), 0.0
    for _ in range(8):
        lower, failed = torch.linalg.cholesky_ex(matrix)
        if not failed:
            return torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True).float()
        damping = max(10 * damping, 1e-4)
        matrix = h.double() + damping * h.diagonal().mean() * torch.eye(len(h), dtype=torch.float64)
    raise VNMError("the second moment of the inputs stays singular under any damping; look at the calibration data.")


def _prune_group(group: Tensor, factor: Tensor, spec: Spec) -> tuple[Tensor, Tensor]:
    """The mask of one group `[O, m]`, and the error e `[O, m]` by which its and later columns change: `- e U`."""
    out_features, m = group.shape
    if m < KEPT_COLUMNS or m > EXACT_UP_TO:
        return _prune_group_greedily(group, factor, spec)
    choices = list(combinations(range(m), spec.n))
    removers = torch.stack([_remover(factor, choice) for choice in choices])  # [choices, m, m]
    errors = torch.einsum("cij,oj->coi", removers, group)
    cost = errors.square().sum(2)  # [choices, O]
    chosen = _best_choices(cost, choices, m, spec)  # [O]
    rows = torch.arange(out_features, device=group.device)
    kept = torch.zeros(len(choices), m, dtype=torch.bool, device=group.device)
    for i, choice in enumerate(choices):
        kept[i, list(choice)] = True
    return kept[chosen], errors[chosen, rows]


def _remover(factor: Tensor, kept: tuple[int, ...]) -> Tensor:
    """The matrix `[m, m]` that takes a row of the group to its error when all but `kept` are removed at once."""
    m = factor.shape[0]
    removed = [i for i in range(m) if i not in kept]
    columns = factor[:, removed].double()  # [m, removed]
    # e = U_P (U_PᵀU_P)⁻¹ w_P is the least-norm e whose product with U_P gives w_P.
    result = torch.zeros(m, m, dtype=torch.float64, device=factor.device)
    result[:, removed] = torch.linalg.pinv(columns.T)
    return result.float()


def _best_choices(cost: Tensor, choices: list[tuple[int, ...]], m: int, spec: Spec) -> Tensor:
    """For each row the cheapest choice inside the 4 columns that its block takes: `[choices, O]` to `[O]`."""
    out_features = cost.shape[1]
    blocks = -(-out_features // spec.v)
    padding = blocks * spec.v - out_features
    number = {choice: i for i, choice in enumerate(choices)}
    best = torch.full((blocks,), torch.inf, device=cost.device)
    winner = torch.zeros(out_features, dtype=torch.int64, device=cost.device)
    for columns in combinations(range(m), KEPT_COLUMNS):
        inside = torch.tensor([number[choice] for choice in combinations(columns, spec.n)], device=cost.device)
        least, which = cost[inside].min(0)
        total = torch.nn.functional.pad(least, (0, padding)).view(blocks, spec.v).sum(1)
        better = (total < best).repeat_interleave(spec.v)[:out_features]
        winner = torch.where(better, inside[which], winner)
        best = torch.minimum(best, total)
    return winner


def _prune_group_greedily(group: Tensor, factor: Tensor, spec: Spec) -> tuple[Tensor, Tensor]:
    """As `_prune_group`, with SparseGPT's saliency of single weights: for tails, and groups too wide to enumerate."""
    diagonal = factor.diagonal()
    # One group: a pattern of its own width finds the block's columns; a narrower tail keeps up to 4 of what it has.
    width = Spec(spec.v, spec.n, max(KEPT_COLUMNS, group.shape[1]))
    kept = project((group / diagonal).square(), width)
    errors = torch.zeros_like(group)
    current = group.clone()
    for j in range(group.shape[1]):
        errors[:, j] = torch.where(kept[:, j], 0.0, current[:, j]) / diagonal[j]
        current[:, j:] -= errors[:, j : j + 1] * factor[j, j:]
    return kept, errors


def _solve_on_mask(dense: Tensor, start: Tensor, mask: Tensor, h: Tensor, steps: int) -> Tensor:
    """Minimise `tr((W - dense) H (W - dense)ᵀ)` over W that is zero outside `mask`, from `start`.

    Conjugate gradients, all rows at once, preconditioned by H's diagonal.
    """
    w = start * mask
    scale = h.diagonal().reciprocal()
    residual = ((dense - w) @ h) * mask
    preconditioned = residual * scale
    direction, energy = preconditioned, (residual * preconditioned).sum(1, keepdim=True)
    for _ in range(steps):
        curved = (direction @ h) * mask
        length = energy / (direction * curved).sum(1, keepdim=True).clamp_min(1e-30)
        w = w + length * direction
        residual = residual - length * curved
        preconditioned = residual * scale
        previous, energy = energy, (residual * preconditioned).sum(1, keepdim=True)
        direction = preconditioned + energy / previous.clamp_min(1e-30) * direction
    return w
