"""What a weight holds, and noticing that it holds something else: what every packed copy depends on.

A weight is known by its place in memory, not by the tensor object: swapping, wrapping and `.data =` change objects and
leave memory, or the reverse, and weak references to tensors would forbid `torch.utils.swap_tensors`. Four things are
looked at, from cheap to dear:

- the place: storage, address, shape, strides. A storage that dies takes everything known of it along, so a new one at
  the same address is a new one.
- the version counter, which almost every write raises.
- a fingerprint: a few cache lines, spread over the rows, that hold non-zeros. It sees writes that raise no counter
  (fused optimizers, `.data`, flat buffers, collectives, numpy, another process) if they change most of the weight.
- a checksum of everything, where there is a doubt: the counter or the fingerprint moved, an optimizer made a step that
  may have touched it, a graph is compiled anew, or the user said so. It is exact, so a doubt costs one read of the
  weight and no packing.

On other devices nothing waits: there every doubt means a change, and the fingerprint is compared on the device, which
is heard of one call later (`vnm_compile.native.gpu_check`).
"""

from __future__ import annotations

import ctypes
import itertools
import random
import weakref
from array import array
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from vnm_compile import native
from vnm_compile._torch import without_modes
from vnm_compile.session import session

_LINE = 64  # bytes of a cache line
_SAMPLES = 4  # of a weight, one line each


@dataclass(frozen=True)
class Place:
    """Where a tensor's elements lie; `storage` is the id of the storage object while it lives."""

    storage: int
    address: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> Place:
        """The place of a strided tensor."""
        return cls(
            id(tensor.untyped_storage()), tensor.data_ptr(), tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype
        )


@dataclass(frozen=True, eq=False)
class Content:
    """What a weight held at one time; as long as it holds the same, this is the same object."""

    checksum: int | None


@dataclass(frozen=True)
class Watch:
    """What was seen of a weight when its content was last made sure of. Everything was read before the content was.

    Attributes:
        place: where it lies.
        version: its version counter; None for inference tensors, which have none.
        samples: pairs of an address and a number of bytes, read for the fingerprint.
        fingerprint: of those; 0 where the CPU cannot read them.
        device: where it lies.
        epoch: `Contents.epoch` before anything was read.
        trains: whether the weight required a gradient.
        content: what it held.
        lines: the samples as recorded on a GPU (`native.gpu_check.Lines`), where they lie there.
    """

    place: Place
    version: int | None
    samples: array[int]
    fingerprint: int
    device: torch.device
    epoch: int
    trains: bool
    content: Content
    lines: Any = None


@contextmanager
def on_real_values() -> Iterator[None]:
    """Compute on what weights hold, whatever the caller is in the middle of: tracing with fake tensors, autocast (which
    refuses fp16 on CPUs), inference mode (whose tensors are no good outside), another default device."""
    with (
        torch.no_grad(),
        torch.inference_mode(False),
        torch.autocast("cpu", enabled=False),
        torch.autocast("cuda", enabled=False) if torch.is_autocast_enabled("cuda") else nullcontext(),
        torch.device("cpu"),
        without_modes(),
    ):
        yield


def version_of(tensor: Tensor) -> int | None:
    """The version counter of a tensor; None for inference tensors, which have none."""
    return None if tensor.is_inference() else tensor._version


def fingerprint_of(samples: array[int]) -> int:
    """The fingerprint of pairs of an address and a number of bytes; those of several weights add up, modulo 2^64.

    The memory must be alive: hold its storage.
    """
    if not samples:
        return 0
    address, length = samples.buffer_info()
    return native.fingerprint()(ctypes.c_void_p(address), length // 2)


def readable(device: torch.device) -> bool:
    """Whether the CPU can read what lies on a device without waiting for it."""
    return device.type == "cpu"


def _fingerprint(samples: array[int], device: torch.device) -> int:
    return fingerprint_of(samples) if readable(device) else 0


def _recorded(samples: array[int], device: torch.device) -> Any:
    if readable(device) or not samples:
        return None
    from vnm_compile.native.gpu_check import record_lines  # needs Triton, which machines without a GPU may lack

    return record_lines(samples, device)


def known_storages(tensors: Iterable[Any]) -> set[int]:
    """Ids of the storages of those of `tensors` that have one."""
    found = set()
    for tensor in tensors:
        if isinstance(tensor, Tensor) and tensor.layout == torch.strided:
            found.add(id(tensor.untyped_storage()))
    return found


@dataclass
class _Storage:
    """What hangs on a storage that is alive."""

    ref: weakref.ref[Any]
    suspected: int = 0  # the epoch since which a watch of it is in doubt
    places: set[Place] = field(default_factory=set)


class Contents:
    """The contents of all weights that somebody asked for; it holds no weight alive."""

    def __init__(self) -> None:
        self.epoch = 0
        """Raised whenever a weight comes into doubt."""
        self._all_suspected = 0
        self._watches: dict[Place, Watch] = {}
        self._storages: dict[int, _Storage] = {}
        self.on_death: list[Callable[[int], None]] = []
        """Called with the id of a storage when it dies, from anywhere: it must take no lock."""
        self._random = random.Random(0)
        self._hooked = False

    def clear(self) -> None:
        """Know of no weight any more. Of storages that are alive only is kept that their death is heard of."""
        with session.lock:
            self.forget()
            self._watches.clear()

    def __len__(self) -> int:
        return len(self._watches)

    def watch(self, weight: Tensor) -> Watch:
        """What is known of a strided weight, made sure of now."""
        storage = weight.untyped_storage()  # keeps the memory that is read, whatever other threads do to the weight
        place = Place.of(weight)
        if id(storage) != place.storage:
            return self.watch(weight)
        watch = self._watches.get(place)
        if watch is not None and self._holds(watch, weight):
            return watch
        with session.lock, on_real_values():
            return self._look(weight, place)

    def forget(self) -> None:
        """Bring every weight into doubt."""
        self.epoch += 1
        self._all_suspected = self.epoch

    def suspect(self, storages: Iterable[int]) -> None:
        """Bring the weights in these storages (by id) into doubt."""
        known = [self._storages.get(storage) for storage in storages]
        if any(known):
            self.epoch += 1
            for each in filter(None, known):
                each.suspected = self.epoch

    def know(self, tensor: Tensor) -> int:
        """The id of a tensor's storage, whose death `on_death` will hear of."""
        storage = tensor.untyped_storage()
        self._know(storage)
        return id(storage)

    def _holds(self, watch: Watch, weight: Tensor) -> bool:
        known = self._storages.get(watch.place.storage)
        if known is None or watch.epoch < max(known.suspected, self._all_suspected):
            return False
        return watch.version == version_of(weight) and watch.fingerprint == _fingerprint(watch.samples, watch.device)

    def _look(self, weight: Tensor, place: Place) -> Watch:
        self._hook()
        known = self._know(weight.untyped_storage())
        old = self._watches.get(place)
        epoch, version = self.epoch, version_of(weight)
        samples = old.samples if old is not None else self._samples(weight)
        fingerprint = _fingerprint(samples, weight.device)
        content = Content(checksum(weight))
        if old is not None and content.checksum is not None and old.content.checksum == content.checksum:
            content = old.content
        elif old is not None:
            samples = self._samples(weight)  # non-zeros may stand elsewhere now
            fingerprint = _fingerprint(samples, weight.device)
            if content.checksum is not None:
                content = Content(checksum(weight))  # read after its fingerprint
        lines = _recorded(samples, weight.device)
        watch = Watch(place, version, samples, fingerprint, weight.device, epoch, weight.requires_grad, content, lines)
        self._watches[place] = watch
        known.places.add(place)
        return watch

    def _know(self, storage: Any) -> _Storage:
        known = self._storages.get(id(storage))
        if known is None or known.ref() is not storage:
            known = self._storages[id(storage)] = _Storage(weakref.ref(storage, self._burier(id(storage))))
        return known

    def _burier(self, storage: int) -> Callable[[Any], None]:
        """What is called when a storage dies. It runs anywhere, so it takes no lock: every step is atomic."""
        contents = weakref.ref(self)

        def bury(ref: Any) -> None:
            self = contents()
            known = self._storages.get(storage) if self is not None else None
            if self is None or known is None or known.ref is not ref:
                return
            self._storages.pop(storage, None)
            for place in tuple(known.places):
                self._watches.pop(place, None)
            for listener in self.on_death:
                listener(storage)

        return bury

    def _samples(self, weight: Tensor) -> array[int]:
        """Where to read for the fingerprint: a line around a non-zero in every strip of rows, each in another strip of
        columns. A write to more than half of the rows, or of the columns, covers a whole strip."""
        samples: array[int] = array("Q")
        if weight.device.type not in ("cpu", "cuda") or weight.dim() != 2 or weight.numel() == 0:
            return samples
        matrix = weight if weight.stride(1) == 1 or weight.stride(0) != 1 else weight.t()
        (rows, width), size = matrix.shape, matrix.element_size()
        for i, strip in enumerate(self._random.sample(range(_SAMPLES), _SAMPLES)):
            row = (i * rows + self._random.randrange(rows)) // _SAMPLES
            left, right = strip * width // _SAMPLES, max((strip + 1) * width // _SAMPLES, strip * width // _SAMPLES + 1)
            nonzero = matrix.detach()[row, left:right].nonzero().flatten().tolist()
            column = left + (self._random.choice(nonzero) if nonzero else 0)
            start = matrix.data_ptr() + row * matrix.stride(0) * size
            address, length = start + column * matrix.stride(1) * size, size
            if matrix.stride(1) == 1:
                line = max(start, address - address % _LINE)
                address, length = line, min(_LINE, start + width * size - line)
            samples.extend((address, length))
        return samples

    def _hook(self) -> None:
        """Hear of optimizer steps: fused ones raise no version counter, and change bf16 weights in few places."""
        if not self._hooked:
            self._hooked = True
            register_optimizer_step_post_hook(torch.compiler.disable(self._after_step))

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if not self._storages:
            return
        stepped = itertools.chain.from_iterable(group["params"] for group in optimizer.param_groups)
        # What trains may be a copy of what the optimizer holds: FSDP gathers shards, others keep a flat buffer.
        trained = {watch.place.storage for watch in tuple(self._watches.values()) if watch.trains}
        self.suspect(known_storages(stepped) | trained)


def checksum(weight: Tensor) -> int | None:
    """A hash of all elements of a matrix; None on other devices than CPUs."""
    if not readable(weight.device) or weight.dim() != 2:
        return None
    if weight.stride(1) != 1 and weight.stride(0) == 1:
        weight = weight.t()
    elif weight.stride(1) != 1:
        weight = weight.contiguous()
    size = weight.element_size()
    rows, width = weight.shape
    stride = weight.stride(0) if rows > 1 else width
    return native.checksum()(weight.data_ptr(), rows, width * size, stride * size)


contents = session.keep("weights looked at", Contents())
"""Shared by everything that packs or looks at weights."""
