"""What a compiled graph is at run time: the right packed arrays for the weights of this call, never stale ones."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from vnm_compile.passes import Decision, PackedInput
from vnm_compile.weights import PackStore, Stamp, stamp

log = logging.getLogger(__name__)

store = PackStore()
"""Shared by all compiled graphs: prefill and decode, or two token counts, use one copy of a weight."""

_dispatchers: weakref.WeakSet[Dispatcher] = weakref.WeakSet()


@dataclass(frozen=True)
class Variant:
    """A graph compiled for one set of decisions."""

    decisions: Sequence[Decision]
    packed: Sequence[PackedInput]
    call: Callable[..., Any]


@dataclass(frozen=True)
class _Binding:
    """The variant and the packed arrays for one set of weights, and what those weights were when they were packed."""

    variant: Variant
    refs: tuple[weakref.ref[Tensor], ...]
    stamps: tuple[Stamp | None, ...]  # None for a weight that stays dense, which may be written to freely
    arrays: tuple[Tensor, ...]

    def fresh(self, weights: Sequence[Tensor]) -> bool:
        for ref, weight, seen in zip(self.refs, weights, self.stamps, strict=True):
            if ref() is not weight or (seen is not None and stamp(weight) != seen):
                return False
        return True


class Dispatcher:
    """The callable that Dynamo gets for a graph.

    Dynamo may share it between modules with the same code, and a weight may change between calls. So on every call
    the graph's weights are compared (identity, version counter, address) with those that were packed; what differs
    is packed again, and a weight that asks for another decision than the graph was compiled for (it lost its pattern,
    or follows another) gets a variant of its own.
    """

    def __init__(
        self,
        positions: Sequence[int],
        decide: Callable[[Sequence[Any]], list[Decision]],
        build: Callable[[Sequence[Any], list[Decision], bool], Variant],
    ) -> None:
        """Compare the inputs at `positions`; `decide` plans for given inputs, `build` compiles what was planned."""
        self._positions = tuple(positions)
        self._decide, self._build = decide, build
        self._bindings: dict[tuple[int, ...], _Binding] = {}
        self._variants: dict[tuple[Any, ...], Variant] = {}
        _dispatchers.add(self)

    def __call__(self, *args: Any) -> Any:
        """Run the graph on its inputs, with whatever its weights hold now."""
        weights = [args[i] for i in self._positions]
        binding = self._bindings.get(tuple(map(id, weights)))
        if binding is None or not binding.fresh(weights):
            binding = self.bind(args)
        return binding.variant.call(*args, *binding.arrays)

    def bind(self, args: Sequence[Any], first: bool = False) -> _Binding:
        """Decide, compile if no variant fits, and pack for the weights among `args`.

        Raises:
            VNMError: an annotated weight breaks its pattern.
        """
        decisions = self._decide(args)
        signature = tuple(decision.spec for decision in decisions)
        variant = self._variants.get(signature)
        if variant is None:
            if not first:
                log.info("weights of the graph ask for other decisions than it was compiled for: compiling a variant")
            variant = self._variants[signature] = self._build(args, decisions, first)
        arrays = tuple(array for group in variant.packed for array in packed_arrays(args, group))
        weights = [args[i] for i in self._positions]
        packed = {i for group in variant.packed for i in group.indices}
        stamps = tuple(stamp(args[i]) if i in packed else None for i in self._positions)
        binding = _Binding(variant, tuple(map(weakref.ref, weights)), stamps, arrays)
        dead = [key for key, each in self._bindings.items() if any(ref() is None for ref in each.refs)]
        for key in dead:
            del self._bindings[key]
        self._bindings[tuple(map(id, weights))] = binding
        return binding

    def forget(self) -> None:
        """Drop every binding, so that the next call packs again."""
        self._bindings.clear()


def packed_arrays(args: Sequence[Any], group: PackedInput) -> Sequence[Tensor]:
    """The three arrays of a packed input, for the weights among `args`."""
    return store.get([args[i] for i in group.indices], group.transposed, group.names, group.spec)


def forget(weights: Sequence[Tensor]) -> None:
    """Have `weights` packed again before they are next used."""
    store.forget(weights)
    for dispatcher in _dispatchers:
        dispatcher.forget()
