"""What a compiled graph is at run time: the right packed arrays for the weights of this call, never stale ones."""

from __future__ import annotations

import logging
import threading
import warnings
import weakref
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

import vnm_compile.codegen.kernels  # noqa: F401 (says which kernels there are)
from vnm_compile._torch import FakeTensor
from vnm_compile.codegen.inductor import prepack_of
from vnm_compile.contents import Place, Watch, contents, fingerprint_of, readable, version_of
from vnm_compile.format import Packed
from vnm_compile.layout import Layout
from vnm_compile.passes import Decision, PackedInput
from vnm_compile.session import session
from vnm_compile.tensor import VNMTensor
from vnm_compile.weights import Kept, PackStore

log = logging.getLogger(__name__)

store = session.keep("packed weights", PackStore(prepack_of))
"""Shared by all compiled graphs: prefill and decode, or two token counts, use one copy of a weight."""

_PATIENCE = 4  # packings in a row of which none was used twice, before the graph runs dense
_OTHERS_EVERY_TIME = (
    f"the weights of a compiled graph were others on each of its last {_PATIENCE} calls (offloading, functional_call, "
    "or a weight made anew), so it runs dense for now: packing a weight for one call costs more than it gains. "
    "vnm.compress_model(model) stores weights packed."
)
_REST = (64, 4096)  # calls that it then runs dense before it is tried again: at first, at most


@dataclass(frozen=True)
class Variant:
    """A graph compiled for one set of decisions."""

    decisions: Sequence[Decision]
    packed: Sequence[PackedInput]
    call: Callable[..., Any]


def packed_arrays(args: Sequence[Any], group: PackedInput) -> list[Tensor]:
    """The arrays of a packed input, for the weights among `args`."""
    if not group.stored:
        return [*_packed(args, group).packed]
    return [array for i in group.indices for array in _stored(args[i])[0]]


def _packed(args: Sequence[Any], group: PackedInput) -> Kept:
    """The arrays of dense weights, joined, and what has to stay as it is for them to be right."""
    return store.get([args[i] for i in group.indices], group.transposed, group.names, group.spec)


def _stored(weight: VNMTensor) -> tuple[Packed, tuple[Watch, ...]]:
    """The arrays of a compressed weight as kernels want them; where they are copies, what has to stay as it is."""
    kept = store.prepared(weight)
    return (weight.packed, ()) if kept is None else (kept.packed, kept.watches)


class _Direct(NamedTuple):
    """A compressed weight whose own arrays are taken at every call.

    Attributes:
        start: of its arrays among those of the graph.
        position: of it among the graph's inputs.
        layout, transposed: as the graph was compiled for.
    """

    start: int
    position: int
    layout: Layout
    transposed: bool

    def fits(self, weight: VNMTensor) -> bool:
        """Whether a weight is stored, and lies the way round, as the graph was compiled for."""
        stored = weight._checked  # once: every call asks
        return stored.transposed == self.transposed and stored.layout == self.layout


class _Binding:
    """A variant with the packed arrays for one set of weights, and what those weights were when they were packed."""

    def __init__(self, variant: Variant, args: Sequence[Any], positions: Sequence[int], epoch: int) -> None:
        self.variant, self.call, self.epoch = variant, variant.call, epoch
        self.used = self.dead = False
        self._arrays: list[Tensor] = []
        self._direct: list[_Direct] = []
        inputs: dict[int, Watch] = {}  # of dense weights that are packed, by their position
        self._copied: dict[int, tuple[Watch, ...]] = {}  # of compressed weights that are prepared for kernels, likewise
        for group in variant.packed:
            if not group.stored:
                kept = _packed(args, group)
                inputs |= zip(group.indices, kept.watches, strict=True)
                self._arrays += kept.packed
            for index, layout, transposed in zip(group.indices, group.stored, group.transposed, strict=False):
                arrays, watches = _stored(args[index])
                if watches:
                    self._copied[index] = watches
                else:
                    self._direct.append(_Direct(len(self._arrays), index, layout, transposed))
                    # They hold their arrays themselves; this must not keep them alive.
                    arrays = arrays.remade(torch.empty(0, device="cpu") for _ in arrays)
                self._arrays += arrays
        self._storages = [contents.know(args[i]) for i in positions]
        self._positions, self._packed = tuple(positions), tuple(inputs)
        self._addresses = [watch.place.address for watch in inputs.values()]
        self._versions = [watch.version for watch in inputs.values()]
        self._counts = None not in self._versions
        on_cpu = [watch for watch in inputs.values() if readable(watch.device)]
        self._samples = array("Q", [value for watch in on_cpu for value in watch.samples])
        self._gpu_checks = _gpu_checks([*inputs.values()])
        self._fingerprint = sum(watch.fingerprint for watch in inputs.values()) % 2**64
        copied = (watch.place.storage for watches in self._copied.values() for watch in watches)
        self.storages = {*self._storages, *copied}

    def fresh(self, args: Sequence[Any]) -> bool:
        """Whether `args` hold these weights, as they were. Every call asks."""
        if self.dead or self.epoch != contents.epoch:
            return False
        # The storages are held while their memory is read: another thread may be replacing a weight.
        storages = [args[i].untyped_storage() for i in self._positions]
        if [*map(id, storages)] != self._storages:
            return False
        packed = [args[i] for i in self._packed]
        if [weight.data_ptr() for weight in packed] != self._addresses:
            return False
        versions = [w._version for w in packed] if self._counts else [version_of(w) for w in packed]
        if versions != self._versions or fingerprint_of(self._samples) != self._fingerprint:
            return False
        if any(check.moved() for check in self._gpu_checks):
            return False
        if self._direct and not all(each.fits(args[each.position]) for each in self._direct):
            return False
        return not self._copied or self._copies_hold(args)

    def tell(self) -> None:
        """Bring the weights into doubt of which a GPU has found that they changed."""
        if any(check.raised for check in self._gpu_checks):
            contents.suspect(self._storages)

    def _copies_hold(self, args: Sequence[Any]) -> bool:
        return all(
            watch.place == Place.of(array) and watch.version == version_of(array)
            for position, watches in self._copied.items()
            for watch, array in zip(watches, args[position].packed, strict=True)
        )

    def run(self, args: Sequence[Any]) -> Any:
        """Call the graph."""
        if not self._direct:
            return self.call(*args, *self._arrays)
        arrays = list(self._arrays)
        for start, position, *_ in self._direct:
            packed = args[position].packed
            arrays[start : start + len(packed)] = packed
        return self.call(*args, *arrays)


def _gpu_checks(watches: Sequence[Watch]) -> list[Any]:
    """What compares the fingerprints of weights on GPUs, one a device."""
    lines: dict[torch.device, list[Any]] = {}
    for watch in watches:
        if watch.lines is not None:
            lines.setdefault(watch.device, []).append(watch.lines)
    if not lines:
        return []
    from vnm_compile.native.gpu_check import GpuCheck

    return [GpuCheck(each) for each in lines.values()]


class Dispatcher:
    """The callable that Dynamo gets for a graph.

    Dynamo may share it between modules with the same code, and a weight may change between calls. So on every call
    the graph's weights are compared with those that were packed (see `vnm_compile.contents`); what differs is packed
    again, and a weight that asks for another decision than the graph was compiled for (it lost its pattern, or follows
    another) gets a variant of its own. A graph whose weights are others on every call runs dense.
    """

    # Dynamo wraps what it is given with functools.wraps, which copies `__dict__`: a binding in it would live on.
    __slots__ = (
        "__weakref__",
        "_bindings",
        "_build",
        "_decide",
        "_latest",
        "_lock",
        "_positions",
        "_rest",
        "_resting",
        "_variants",
        "_wasted",
    )

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
        self._bindings: dict[tuple[tuple[int, int], ...], _Binding] = {}
        self._variants: dict[tuple[Any, ...], Variant] = {}
        self._wasted = 0  # bindings in a row that no second call used
        self._resting, self._rest = 0, _REST[0]
        self._lock = threading.RLock()
        dispatchers.add(self)

    def __call__(self, *args: Any) -> Any:
        """Run the graph on its inputs, with whatever its weights hold now."""
        binding = self._latest
        if binding is None or not binding.fresh(args):
            binding = self._find(args)
        else:
            binding.used = True
        return binding.run(args) if binding is not None else self._dense(args).call(*args)

    def _find(self, args: Sequence[Any]) -> _Binding | None:
        """The binding for these weights, made where there is none; None where they have to run dense."""
        if any(_without_memory(args[i]) for i in self._positions):
            return None
        with self._lock:
            key = self._key(args)
            binding = self._bindings.get(key)
            if binding is not None and binding.fresh(args):
                binding.used = True
                self._wasted, self._rest = 0, _REST[0]
                self._latest = binding
                return binding
            if binding is not None:
                binding.tell()
                self._bindings.pop(key, None)  # let go of once: while the graph rests, nothing is wasted
                self._let_go(binding)
            return None if self._rests() else self.bind(args)

    def bind(self, args: Sequence[Any], first: bool = False) -> _Binding:
        """Decide, compile if no variant fits, and pack for the weights among `args`.

        Raises:
            VNMError: an annotated weight breaks its pattern.
        """
        with self._lock:
            epoch = contents.epoch
            variant = self._variant(args, self._decide(args), first)
            binding = _Binding(variant, args, self._positions, epoch)
            self._bindings[self._key(args)] = binding
            self._latest = binding
            return binding

    def bury(self, storage: int) -> None:
        """Drop what belongs to a storage that has died."""
        for key in list(self._bindings):
            binding = self._bindings.get(key)
            if binding is not None and storage in binding.storages:
                self._bindings.pop(key, None)
                self._let_go(binding)

    def clear(self) -> None:
        """Let go of all weights: the next call binds anew."""
        with self._lock:
            for binding in [*self._bindings.values()]:
                binding.dead = True
            self._bindings.clear()
            self._latest = None
            self._wasted = self._resting = 0

    def _variant(self, args: Sequence[Any], decisions: list[Decision], first: bool = False) -> Variant:
        signature = tuple((decision.layout, decision.compressed) for decision in decisions)
        variant = self._variants.get(signature)
        if variant is None:
            if not first:
                log.info("weights of the graph ask for other decisions than it was compiled for: compiling a variant")
            variant = self._variants[signature] = self._build(args, decisions, first)
        return variant

    def _dense(self, args: Sequence[Any]) -> Variant:
        """The graph with nothing compressed, which is right whatever the weights hold."""
        with self._lock:
            some = next(iter(self._variants.values()), None)
            decisions = some.decisions if some is not None else self._decide(args)
            reason = "its weights were others on every call"
            return self._variant(
                args, [replace(decision, layout=None, compressed=False, reason=reason) for decision in decisions]
            )

    def _key(self, args: Sequence[Any]) -> tuple[tuple[int, int], ...]:
        weights = [args[i] for i in self._positions]
        return tuple(
            (id(weight.untyped_storage()), 0 if isinstance(weight, VNMTensor) else weight.data_ptr())
            for weight in weights
        )

    def _let_go(self, binding: _Binding) -> None:
        binding.dead = True
        if self._latest is binding:
            self._latest = None
        self._wasted = 0 if binding.used else self._wasted + 1

    def _rests(self) -> bool:
        """Whether to run dense for now: packing takes much longer than a call, and was never worth it lately."""
        if self._resting:
            self._resting -= 1
            return True
        if self._wasted < _PATIENCE:
            return False
        self._wasted = _PATIENCE - 1  # one more try after the rest
        self._resting, self._rest = self._rest, min(2 * self._rest, _REST[1])
        if session.first_time(_OTHERS_EVERY_TIME):
            warnings.warn(_OTHERS_EVERY_TIME, stacklevel=4)
        return True


def forget() -> None:
    """Have every weight looked at, element by element, before it is next used."""
    contents.forget()


def _without_memory(weight: Any) -> bool:
    """Whether a weight has no values to pack: a fake one (somebody traces through compiled code), or one on meta."""
    return isinstance(weight, FakeTensor) or weight.is_meta


class _Dispatchers:
    """Those that are alive."""

    def __init__(self) -> None:
        self._refs: dict[int, weakref.ref[Dispatcher]] = {}
        contents.on_death.append(self._bury)

    def add(self, dispatcher: Dispatcher) -> None:
        key = id(dispatcher)
        self._refs[key] = weakref.ref(dispatcher, lambda _: self._refs.pop(key, None))

    def __len__(self) -> int:
        return len(self._refs)

    def clear(self) -> None:
        """Have them let go of all weights; Dynamo holds the graphs, which stay compiled."""
        for dispatcher in self.alive():
            dispatcher.clear()

    def _bury(self, storage: int) -> None:
        for dispatcher in self.alive():
            dispatcher.bury(storage)

    def alive(self) -> list[Dispatcher]:
        """The dispatchers of graphs that somebody holds."""
        return [dispatcher for ref in tuple(self._refs.values()) if (dispatcher := ref()) is not None]


dispatchers = session.keep("compiled graphs", _Dispatchers())
