"""Timing several ways of computing one thing, so that their ratio can be trusted."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any


@dataclass(frozen=True)
class Result:
    """What was measured of one case.

    Attributes:
        seconds: median seconds a call, or a part of it, by contender.
        baseline: the fastest contender other than ours.
        ratio: median seconds of the baseline over ours: above 1, ours is faster.
        low, high: quartiles of the same ratio taken round by round.
        rounds: calls of each contender.
    """

    seconds: dict[str, float]
    baseline: str
    ratio: float
    low: float
    high: float
    rounds: int


def compare(contenders: Mapping[str, Callable[[], Any]], ours: str, seconds: float = 1.0, parts: int = 1) -> Result:
    """Call the contenders in turn for about `seconds` (7 to 300 rounds), so that noise hits all of them alike.

    A call consists of `parts` alike, and the seconds are those of one.
    """
    for call in contenders.values():
        for _ in range(3):
            call()
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    begin = time.perf_counter()
    while len(taken[ours]) < 7 or (time.perf_counter() - begin < seconds and len(taken[ours]) < 300):
        for name, call in contenders.items():
            start = time.perf_counter()
            call()
            taken[name].append((time.perf_counter() - start) / parts)
    medians = {name: median(each) for name, each in taken.items()}
    baseline = min((name for name in medians if name != ours), key=medians.__getitem__)
    rounds = [dense / sparse for dense, sparse in zip(taken[baseline], taken[ours], strict=True)]
    low, _, high = quantiles(rounds, n=4)
    return Result(medians, baseline, medians[baseline] / medians[ours], low, high, len(rounds))
