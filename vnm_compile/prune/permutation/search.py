"""Search for the order of channels under which V:N:M keeps the most.

An order of channels is the order of columns of some weights and of rows of others. What V:N:M keeps of them depends on
which columns share a group of M, and which rows a block of V. The search improves the order step by step: it takes a
set of channels no two of which share a group, and finds their best exchange of places, a linear assignment problem.

The value of a place for a channel is what its groups and blocks keep if they take, beside the channel, what they took
before (columns: three of the columns kept so far, or four without the channel; rows: the same columns as so far). That
is a lower bound, exact for the present order, and it adds up over the channels: no step makes the total smaller. Such
steps alone end in a poor order, so the values get noise at first, less in every sweep (annealing), and the best order
that was met is what counts.

Source: "Beyond 2:4", arXiv 2410.16135, which alternates assignment problems for input and output channels. Channels
that are rows of one weight and columns of another are moved for both at once here, and the bound is ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vnm_compile.errors import BadPermutation, MissingPackage
from vnm_compile.prune.permutation.uses import ColumnUse, RowUse
from vnm_compile.prune.project import project
from vnm_compile.spec import Spec

HEAT = 0.6
_SWEEPS = (30, 200)  # at least, at the most
_MOVES = 16384  # of single channels, between the two
_LEAST_GAIN = 1e-5
_COLD = 0.75  # the share of the sweeps after which there is no noise any more
_MOST_AT_ONCE = 1024  # channels of one assignment problem: bounds its time and the memory of its matrix


@dataclass(frozen=True)
class Use:
    """One weight that follows the order of channels.

    Attributes:
        scores: `[O, K]`, non-negative; the importance of its weights, in the present order.
        spec: its pattern.
        dim: 0 where its rows follow the order, 1 where its columns do.
        positions: int64 `[channels, copies]`, where in that dimension each channel stands; None: channel i at i.
    """

    scores: Tensor
    spec: Spec
    dim: int
    positions: Tensor | None = None


def retained(scores: Tensor, spec: Spec) -> float:
    """The share of the scores that `project`'s mask keeps."""
    total = scores.sum(dtype=torch.float64)
    return float((scores * project(scores, spec)).sum(dtype=torch.float64) / total) if total > 0 else 1.0


def search(
    uses: Sequence[Use], block: int | None = None, seed: int = 0, sweeps: int | None = None, heat: float = HEAT
) -> tuple[Tensor, float, float]:
    """Return an order of channels under which the uses keep more, or the present order.

    What is maximised is the sum over the uses of the share that each keeps of its scores. Memory: some copies of the
    scores of all uses.

    Args:
        uses: the weights that follow the order; each weight once.
        block: channels may change places only with those of the same `channel // block`; anywhere when None.
        seed: of the order in which channels are tried, and of the noise; the result depends on nothing else.
        sweeps: how often, at the most, every channel is moved; None takes more of them for fewer channels.
        heat: noise of the first sweep, as a share of the spread of values; 0 only ever goes uphill.

    Returns:
        order: int64 `[channels]`, the present number of the channel that each new place gets.
        before, after: the sum of the shares kept by `project`'s mask; `after >= before` always.

    Raises:
        VNMError: no uses, uses that disagree on the number of channels, or SciPy is missing.
    """
    size = _channels(uses)
    block = size if block is None else block
    order = torch.arange(size, device="cpu")
    before = sum(retained(use.scores, use.spec) for use in uses)
    columns, rows = _movable(uses, block)
    if not columns and not rows:
        return order, before, before
    generator = torch.Generator("cpu").manual_seed(seed)
    best, value = order.clone(), sum(each.value() for each in (*columns, *rows))
    sweeps = min(max(_MOVES // size, _SWEEPS[0]), _SWEEPS[1]) if sweeps is None else sweeps
    for sweep in range(sweeps):
        noise = heat * max(0.0, 1 - sweep / (_COLD * sweeps))
        for places in _independent_sets(columns, size, generator):
            sources = _assign(columns, rows, places, block, noise, generator)
            if sources is None:
                continue
            order[places] = order[sources]
            for each in (*columns, *rows):
                each.move(places, sources)
        previous, found = value, sum(each.value() for each in (*columns, *rows))
        if found > value:
            best, value = order.clone(), found
        if noise == 0 and value - previous < _LEAST_GAIN * previous:
            break
    after = sum(retained(_moved(use, best), use.spec) for use in uses)
    if after <= before:
        return torch.arange(size, device="cpu"), before, before
    return best, before, after


def _channels(uses: Sequence[Use]) -> int:
    sizes = {len(use.positions) if use.positions is not None else use.scores.shape[use.dim] for use in uses}
    if len(sizes) != 1:
        found = f"of {', '.join(map(str, sorted(sizes)))} channels" if sizes else "none"
        raise BadPermutation(f"the weights that follow one order of channels must have as many each; found {found}.")
    return sizes.pop()


def _movable(uses: Sequence[Use], block: int) -> tuple[list[ColumnUse], list[RowUse]]:
    """The uses for which the order makes a difference."""
    columns: list[ColumnUse] = []
    rows: list[RowUse] = []
    for use in uses:
        total = use.scores.sum(dtype=torch.float64)
        if total <= 0:
            continue
        place = use.positions
        if place is None:
            place = torch.arange(use.scores.shape[use.dim], device="cpu").unsqueeze(1)
        unit = use.spec.v if use.dim == 0 else use.spec.m
        units = place // unit
        blocks = torch.arange(len(place), device="cpu") // block
        same = all(bool((units[blocks == b] == units[blocks == b][:1]).all()) for b in blocks.unique())
        if same or (use.dim == 0 and use.spec.m == 4):
            continue
        if use.dim == 1 and place.shape[1] > 1 and bool((units.sort(1).values.diff(dim=1) == 0).any()):
            continue  # copies of one channel in one group: its value there is not a sum over copies
        shares = use.scores.float() / total.float()
        if use.dim == 1:
            columns.append(ColumnUse(shares, use.spec, place))
        else:
            rows.append(RowUse(shares, use.spec, place))
    return columns, rows


def _independent_sets(columns: Sequence[ColumnUse], size: int, generator: torch.Generator) -> list[Tensor]:
    """All channels, in sets of which no two share a group of any column use."""
    left = torch.randperm(size, generator=generator, device="cpu").tolist()
    groups = [[list(map(int, row)) for row in use.groups] for use in columns]
    sets = []
    while left:
        taken: list[int] = []
        later: list[int] = []
        used: list[set[int]] = [set() for _ in columns]
        for channel in left:
            free = all(seen.isdisjoint(group[channel]) for seen, group in zip(used, groups, strict=True))
            if free and len(taken) < _MOST_AT_ONCE:
                taken.append(channel)
                for seen, group in zip(used, groups, strict=True):
                    seen.update(group[channel])
            else:
                later.append(channel)
        sets.append(torch.tensor(taken, device="cpu"))
        left = later
    return sets


def _assign(
    columns: Sequence[ColumnUse],
    rows: Sequence[RowUse],
    places: Tensor,
    block: int,
    noise: float,
    generator: torch.Generator,
) -> Tensor | None:
    """The best exchange of places among these channels: the channel that each place gets; None if that is no change."""
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:
        raise MissingPackage('channel permutation needs SciPy; run pip install "vnm-compile[prune]".') from error
    worth = torch.zeros(len(places), len(places), dtype=torch.float64, device="cpu")
    for each in (*columns, *rows):
        worth += each.worth(places).double().cpu()
    if noise > 0:
        # What is the same for a whole row or column of the matrix makes no difference to the assignment.
        differing = worth - worth.mean(0) - worth.mean(1, keepdim=True) + worth.mean()
        worth += (
            noise
            * differing.square().mean().sqrt()
            * torch.randn(worth.shape, generator=generator, dtype=torch.float32, device="cpu").double()
        )
    home = places // block
    worth[home.unsqueeze(1) != home] = -1e6  # the worth of a place is a share, at most 1 a use
    place, source = map(torch.from_numpy, linear_sum_assignment(worth.numpy(), maximize=True))
    gain = worth[place, source].sum() - worth.diagonal().sum()
    return places[source] if gain > 1e-9 else None


def _moved(use: Use, order: Tensor) -> Tensor:
    """The scores of a use in a new order."""
    place = use.positions if use.positions is not None else torch.arange(len(order), device="cpu").unsqueeze(1)
    index = torch.arange(use.scores.shape[use.dim], device="cpu")
    index[place] = place[order]
    return use.scores.index_select(use.dim, index.to(use.scores.device))
