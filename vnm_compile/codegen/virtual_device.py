"""A GPU that is not there: everything Inductor and Triton ask a device while they generate and compile code.

Inside `virtual_device("sm_90")` torch believes in one CUDA device of that architecture (a ROCm device for `gfx942`).
Fake tensors on "cuda" can be traced, lowered and generated for, and Triton compiles to machine code, with the code
paths and choices that the real card would get. Nothing can run: no stream, memory or launch exists.

Every change is undone on exit, and answers that were cached meanwhile are forgotten. A real GPU in the machine is not
touched. The changes are seen by the whole process; a lock keeps two virtual devices apart.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch

from vnm_compile._torch import cuda_answers
from vnm_compile.codegen.inductor import device_patches, forget_device_answers
from vnm_compile.hardware import Target, find_target, target_of

_lock = threading.RLock()
_active: Target | None = None

# What torch.version.hip holds in ROCm builds, which is how torch tells AMD's devices from NVIDIA's.
_HIP_VERSION = "6.4"
# Places of c10::DeviceType in the table of device guards.
_CUDA, _META = 1, 14
_GUARD_TABLE = "_ZN3c104impl26device_guard_impl_registryE"


def active_target() -> Target | None:
    """The target of the virtual device that code is being generated for; None on real devices."""
    return _active


def device_target(device: torch.device | int | None = None) -> Target:
    """What code is being generated for: the virtual device if there is one, else the real one."""
    return _active if _active is not None else target_of(torch.cuda.get_device_properties(device))


@contextmanager
def virtual_device(target: Target | str) -> Iterator[Target]:
    """Make the process believe in one GPU, `target`, as far as code generation goes.

    Autotuning cannot measure here: of several choices for a kernel Inductor takes the first, so lowerings list them
    best first by their static model, which `device_target()` tells what it needs to know.

    Args:
        target: a `Target` or its name, such as "sm_90".

    Raises:
        VNMError: there is no such target.
    """
    global _active
    target = find_target(target)
    with _lock, ExitStack() as stack:
        forget_device_answers()
        stack.callback(forget_device_answers)
        for owner, name, value in [*_torch_answers(target), *device_patches()]:
            stack.enter_context(patch.object(owner, name, value))
        stack.enter_context(_triton_driver(target))
        stack.enter_context(device_guard())
        previous, _active = _active, target
        try:
            yield target
        finally:
            _active = previous


@contextmanager
def device_guard() -> Iterator[None]:
    """Let fake tensors on "cuda" be sliced and moved in builds of torch that know no CUDA.

    Such a build has no device guard for CUDA, and indexing asks for one before fake tensors see the call. (Builds that
    know CUDA but find no device get one that does nothing from FakeTensorMode.) The guard of the meta device, which
    does nothing either, stands in for it.
    """
    library = Path(torch.__file__).parent / "lib" / "libc10.so"
    if torch.backends.cuda.is_built() or torch.version.hip or not library.exists():
        yield
        return
    table = (ctypes.c_void_p * (_META + 1)).in_dll(ctypes.CDLL(str(library)), _GUARD_TABLE)
    previous, table[_CUDA] = table[_CUDA], table[_META]
    try:
        yield
    finally:
        table[_CUDA] = previous


def _properties(target: Target) -> SimpleNamespace:
    """What torch.cuda.get_device_properties() returns."""
    major, minor = target.capability
    return SimpleNamespace(
        name=target.card,
        major=major,
        minor=minor,
        gcnArchName=target.arch if target.backend == "hip" else "",
        warp_size=target.warp_size,
        multi_processor_count=target.multiprocessors,
        max_threads_per_multi_processor=target.threads,
        max_threads_per_block=1024,
        regs_per_multiprocessor=target.registers,
        shared_memory_per_block=48 << 10,
        shared_memory_per_block_optin=target.shared_bytes,
        shared_memory_per_multiprocessor=target.shared_bytes + 1024,
        L2_cache_size=target.l2_bytes,
        total_memory=64 << 30,
        is_integrated=False,
        is_multi_gpu_board=False,
    )


def _torch_answers(target: Target) -> list[tuple[Any, str, Any]]:
    """(owner, attribute, value) of everything in torch that is asked about devices."""
    props = _properties(target)

    def always(value: Any) -> Callable[..., Any]:
        return lambda *args, **kwargs: value

    same_everywhere = {
        "get_device_properties": always(props),
        "current_device": always(0),
        "device_count": always(1),
    }
    return [
        (torch.cuda, "is_available", always(True)),
        (torch.cuda, "get_device_capability", always(target.capability)),
        (torch.cuda, "get_device_name", always(target.card)),
        (torch.cuda, "is_bf16_supported", always(True)),
        (torch.cuda, "is_tf32_supported", always(target.backend == "cuda")),
        # Compilation saves and restores random states and the current device.
        (torch.cuda, "get_rng_state", always(torch.empty(0, dtype=torch.uint8))),
        (torch.cuda, "set_rng_state", always(None)),
        (torch.cuda, "_exchange_device", always(0)),
        (torch.cuda, "_maybe_exchange_device", always(0)),
        *((torch.cuda, name, value) for name, value in same_everywhere.items()),
        (torch.version, "hip", _HIP_VERSION if target.backend == "hip" else None),
        *cuda_answers(same_everywhere),
    ]


class _Driver:
    """A Triton driver that names its target and its limits, and can do nothing else."""

    def __init__(self, target: Target) -> None:
        from triton.backends.compiler import GPUTarget

        self._target = GPUTarget(target.backend, target.arch, target.warp_size)
        limits = {
            "max_shared_mem": target.shared_bytes,
            "max_num_regs": target.registers,
            "multiprocessor_count": target.multiprocessors,
            "warpSize": target.warp_size,
        }
        self.utils = SimpleNamespace(get_device_properties=lambda device: limits)

    def get_current_target(self) -> Any:
        return self._target

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0


@contextmanager
def _triton_driver(target: Target) -> Iterator[None]:
    from triton.runtime.driver import driver

    with patch.object(driver, "_active", _Driver(target)):
        yield
