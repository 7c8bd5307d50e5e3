"""A layer's pruned weight, kept packed until all layers are done: the model is written to once, at the very end.

So nothing has to be copied to return to when something fails, and what a run needs beside the model is about the share
of the weights that the pattern keeps.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vnm_compile.format import Packed, pack, unpack
from vnm_compile.layers import Layer
from vnm_compile.layout import Layout
from vnm_compile.prune.calibration.hooks import hooked
from vnm_compile.spec import Spec

_SLAB_ELEMENTS = 1 << 20  # weights that are worked on at a time


def slabs(weight: Tensor, spec: Spec) -> Iterator[slice]:
    """Rows of a weight that are worked on together: whole blocks of V."""
    out_features, in_features = weight.shape
    step = max(1, _SLAB_ELEMENTS // (spec.v * in_features)) * spec.v
    for start in range(0, out_features, step):
        yield slice(start, min(start + step, out_features))


class Pruned:
    """The pruned weight of one layer, and what pruning did to it.

    Attributes:
        layer, spec: the layer, and its pattern.
        output_error: on the calibration data; None where it was not measured.
    """

    def __init__(self, layer: Layer, spec: Spec, output_error: float | None = None) -> None:
        self.layer, self.spec, self.output_error = layer, spec, output_error
        self._parts: list[tuple[slice, Packed]] = []
        self._total = self._kept = 0.0

    @classmethod
    def of(cls, layer: Layer, spec: Spec, new: Tensor, dense: Tensor, output_error: float | None = None) -> Pruned:
        """From a whole weight `new` that follows `spec`, which is to take the place of `dense`."""
        pruned = cls(layer, spec, output_error)
        for rows in slabs(dense, spec):
            pruned.add(rows, new[rows], dense[rows])
        return pruned

    def add(self, rows: slice, new: Tensor, dense: Tensor) -> None:
        """Add some rows, counted from a multiple of V.

        Raises:
            VNMError: they break the pattern.
        """
        size = dense.abs()
        self._total += size.sum(dtype=torch.float64).item()
        self._kept += size.mul_(new != 0).sum(dtype=torch.float64).item()
        self._parts.append((rows, pack(new, self.spec, self.layer.name)))

    @property
    def retained(self) -> float:
        """Share of the dense weight's L1 norm that stood in the kept places."""
        return self._kept / self._total if self._total else 1.0

    def parts(self) -> Iterator[tuple[slice, Tensor]]:
        """Rows, and the weights in them: `[rows, K]`."""
        in_features = self.layer.weight.shape[1]
        for rows, packed in self._parts:
            yield rows, unpack(packed, Layout(self.spec, rows.stop - rows.start, in_features))

    def weight(self) -> Tensor:
        """The whole weight, `[O, K]`."""
        return torch.cat([part for _, part in self.parts()])

    def write(self) -> None:
        """Write the weight into the layer."""
        target = self.layer.weight
        for rows, part in self.parts():
            target[rows].copy_(part)


def write_all(pruned: Iterable[Pruned]) -> None:
    """Write all pruned weights into their layers."""
    with torch.no_grad():
        for each in pruned:
            each.write()


def running_pruned(pruned: Sequence[Pruned]) -> AbstractContextManager[None]:
    """While it lasts, these layers compute with their pruned weights; the weights exist only while a layer runs."""
    return running_with([each.layer for each in pruned], [each.weight for each in pruned])


@contextmanager
def running_with(layers: Sequence[Layer], weights: Sequence[Callable[[], Tensor]]) -> Iterator[None]:
    """While it lasts, these layers compute with other weights `[O, K]`, which are made when a layer runs."""
    modules = [layer.module for layer in layers]
    dense = [module._parameters["weight"] for module in modules]

    def put(i: int, args: Any, kwargs: Any) -> None:
        weight = weights[i]()
        weight = weight.t().contiguous() if layers[i].transposed else weight
        modules[i]._parameters["weight"] = nn.Parameter(weight, requires_grad=False)

    def take(i: int) -> None:
        modules[i]._parameters["weight"] = dense[i]

    try:
        with hooked(modules, put, take):
            yield
    finally:
        for i in range(len(modules)):
            take(i)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold back Ctrl-C until the end: what is done inside is done whole."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    caught: list[tuple[Any, Any]] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: caught.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before if before is not None else signal.SIG_DFL)
        if caught and callable(before):
            before(*caught[0])
