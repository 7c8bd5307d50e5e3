"""What a compiled graph is at run time: the right packed arrays for the weights of this call, never stale ones."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from vnm_compile.passes import Decision, PackedInput
from vnm_compile.weights import PackStore, Stamp, counts_versions, stamp

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


class _Binding:
    """The variant and the packed arrays for one set of weights, and what those weights were when they were packed."""

    def __init__(self, variant: Variant, weights: Mapping[int, Tensor], arrays: tuple[Tensor, ...]) -> None:
        """Bind `weights`, by their position among the inputs."""
        self.variant, self.call, self.arrays = variant, variant.call, arrays
        self._refs = {i: weakref.ref(weight) for i, weight in weights.items()}
        self._counted: list[tuple[int, weakref.ref[Tensor], int, int]] = []
        self._others: list[tuple[int, weakref.ref[Tensor], Stamp | None]] = []
        packed = {i for group in variant.packed for i in group.indices}
        for i, weight in weights.items():
            if i not in packed:  # it stays dense, and may be written to freely
                self._others.append((i, self._refs[i], None))
            elif counts_versions(weight):
                version, address = stamp(weight)
                self._counted.append((i, self._refs[i], version, address))
            else:
                self._others.append((i, self._refs[i], stamp(weight)))

    def fresh(self, args: Sequence[Any]) -> bool:
        """Whether `args` hold these weights, as they were. Every call asks, so `stamp` is written out here."""
        for i, ref, version, address in self._counted:
            weight: Tensor = args[i]
            if weight is not ref() or weight._version != version or weight.data_ptr() != address:
                return False
        for i, ref, seen in self._others:
            if args[i] is not ref() or (seen is not None and stamp(args[i]) != seen):
                return False
        return True

    @property
    def dead(self) -> bool:
        """Whether one of the weights is gone."""
        return any(ref() is None for ref in self._refs.values())


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
        self._latest: _Binding | None = None
        self._bindings: dict[tuple[int, ...], _Binding] = {}
        self._variants: dict[tuple[Any, ...], Variant] = {}
        _dispatchers.add(self)

    def __call__(self, *args: Any) -> Any:
        """Run the graph on its inputs, with whatever its weights hold now."""
        binding = self._latest
        if binding is None or not binding.fresh(args):
            binding = self._bindings.get(self._key(args))
            if binding is None or not binding.fresh(args):
                binding = self.bind(args)
            self._latest = binding
        return binding.call(*args, *binding.arrays)

    def _key(self, args: Sequence[Any]) -> tuple[int, ...]:
        return tuple(id(args[i]) for i in self._positions)

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
        binding = _Binding(variant, {i: args[i] for i in self._positions}, arrays)
        self._bindings = {key: each for key, each in self._bindings.items() if not each.dead}
        self._bindings[self._key(args)] = binding
        return binding

    def forget(self) -> None:
        """Drop every binding, so that the next call packs again."""
        self._latest = None
        self._bindings.clear()


def packed_arrays(args: Sequence[Any], group: PackedInput) -> Sequence[Tensor]:
    """The three arrays of a packed input, for the weights among `args`."""
    return store.get([args[i] for i in group.indices], group.transposed, group.names, group.spec)


def forget(weights: Sequence[Tensor]) -> None:
    """Have `weights` packed again before they are next used."""
    store.forget(weights)
    for dispatcher in _dispatchers:
        dispatcher.forget()
