"""The door to torch's privates outside of Inductor: what this package uses of torch that has no public name.

When a version of torch moves one of these, it is mended here and nowhere else. (Inductor has a door of its own:
`vnm_compile.codegen.inductor`.)
"""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._guards import TracingContext, tracing
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch._subclasses.meta_utils import MetaTensorDescriber
from torch.autograd import forward_ad
from torch.autograd.forward_ad import _set_fwd_grad_enabled as forward_mode_recorded
from torch.autograd.function import _SingleLevelFunction as SingleLevelFunction
from torch.overrides import _pop_mode_temporarily
from torch.utils._python_dispatch import _disable_current_modes as without_modes
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves, tree_map_only

__all__ = [
    "FakeTensor",
    "FakeTensorMode",
    "HigherOrderOperator",
    "OpOverload",
    "OpOverloadPacket",
    "SingleLevelFunction",
    "TracingContext",
    "autocast_excluded",
    "autocast_key",
    "below_autograd",
    "constant_source",
    "cuda_answers",
    "disabled_torch_function",
    "fake_modes",
    "forget_descriptions",
    "forward_mode_recorded",
    "in_forward_mode",
    "in_transform",
    "is_traceable_wrapper_subclass",
    "is_wrapped_by_transform",
    "open_transforms",
    "parameter_moved",
    "short_traceback",
    "single_level_functions_allowed",
    "static_sizes",
    "trace_artifact",
    "tracing",
    "tree_leaves",
    "tree_map_only",
    "unwrapped_errors",
    "without_dispatch",
    "without_fsdp_class",
    "without_function_modes",
    "without_modes",
    "without_torch_function",
]

disabled_torch_function = torch._C._disabled_torch_function_impl
"""What a subclass sets as `__torch_function__` to have none."""

without_torch_function = torch._C.DisableTorchFunctionSubclass
"""A block in which no `__torch_function__` of a subclass is asked."""

without_dispatch = torch._C._DisableTorchDispatch
"""A block in which no `__torch_dispatch__` is asked."""

below_autograd = torch._C._AutoDispatchBelowAutograd
"""A block in which ops are answered below autograd."""


@contextmanager
def without_function_modes() -> Iterator[None]:
    """A block without the caller's modes of torch functions; a default device is one of these."""
    with ExitStack() as stack:
        while torch._C._len_torch_function_stack():
            stack.enter_context(_pop_mode_temporarily())
        yield


# Autocast, as an op sees it.


def autocast_key(device: str) -> str:
    """Name of the dispatch key under which ops are registered for autocast on a type of device."""
    return f"Autocast{device.upper()}"


def autocast_excluded(device: str) -> AbstractContextManager[Any]:
    """A block in which ops are not asked for autocast on a type of device."""
    key = getattr(torch._C.DispatchKey, autocast_key(device))
    return torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key))


# Forward mode and torch.func.


def in_forward_mode() -> bool:
    """Whether a level of forward-mode AD is open."""
    return forward_ad._current_level >= 0


def in_transform() -> bool:
    """Whether the caller is inside a transform of torch.func (vmap, grad, jvp)."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def open_transforms() -> int:
    """How many transforms of torch.func the caller is inside of."""
    return len(torch._C._functorch.get_interpreter_stack() or ())


def is_wrapped_by_transform(tensor: Tensor) -> bool:
    """Whether a tensor is one that a transform of torch.func has wrapped."""
    return torch._C._functorch.is_functorch_wrapped_tensor(tensor)


@contextmanager
def single_level_functions_allowed() -> Iterator[None]:
    """A block in which a `SingleLevelFunction` may be applied."""
    allowed = torch._C._functorch.get_single_level_autograd_function_allowed()
    torch._C._functorch.set_single_level_autograd_function_allowed(True)
    try:
        yield
    finally:
        torch._C._functorch.set_single_level_autograd_function_allowed(allowed)


# Dynamo; imported when used, for it is heavy.


def constant_source(name: str) -> Any:
    """The source that Dynamo gives to a constant: what a placeholder that we add says it comes from."""
    from torch._dynamo.source import ConstantSource

    return ConstantSource(name)


def short_traceback() -> type[BaseException]:
    """The class of errors that `torch.compile` hands to the user as they are, not wrapped in its own."""
    from torch._dynamo.exc import ShortenTraceback

    return ShortenTraceback


@contextmanager
def unwrapped_errors(kind: type[Exception]) -> Iterator[None]:
    """A block in which an error that a backend raises is seen as it was raised, not wrapped in Dynamo's own."""
    from torch._dynamo.exc import BackendCompilerFailed

    try:
        yield
    except BackendCompilerFailed as failed:
        if isinstance(failed.inner_exception, kind):
            raise failed.inner_exception from None
        raise


def static_sizes() -> AbstractContextManager[Any]:
    """A block in which a size that differs from an earlier call's does not become symbolic for that alone."""
    import torch._dynamo.config as config

    return config.patch(automatic_dynamic_shapes=False)


def trace_artifact(name: str, text: Callable[[], str]) -> None:
    """Add text to the trace that TORCH_TRACE asks for, as tlparse shows it."""
    metadata = {"name": name, "encoding": "string"}
    torch._logging.trace_structured("artifact", metadata_fn=lambda: metadata, payload_fn=text)


def fake_modes(values: Any) -> set[Any]:
    """The modes of the fake tensors among `values`, also of those inside wrapper subclasses, and the one of the
    compilation under way."""
    context = TracingContext.try_get()
    found = {context.fake_mode} if context is not None and context.fake_mode is not None else set()
    for value in tree_leaves(values):
        if isinstance(value, FakeTensor):
            found.add(value.fake_mode)
        elif isinstance(value, Tensor) and is_traceable_wrapper_subclass(value):
            names, _ = value.__tensor_flatten__()  # type: ignore[attr-defined]
            found |= fake_modes([getattr(value, name) for name in names])
    return found


def forget_descriptions(modes: Iterable[Any], tensors: Iterable[Any]) -> None:
    """Drop the weak references to `tensors` that fake modes and the compilation under way keep: while they are there,
    `torch.utils.swap_tensors` refuses the tensors. (Dynamo does so after a compilation by a backend that it knows by
    its name.)"""
    described = [mode.fake_tensor_converter.meta_converter.describer.lookup_tensor for mode in modes]
    context = TracingContext.try_get()
    if context is not None:  # a backward that is compiled later keeps it
        described.append(context.tensor_to_context)
    for tensor in tensors:
        if isinstance(tensor, Tensor):
            for each in described:
                each.pop(tensor, None)


def let_move(tensor: Tensor) -> None:
    """Drop the weak references to `tensor` that compilations keep which are over: `torch.utils.swap_tensors`, by which
    `module.to` moves tensor subclasses, refuses a tensor while there are any.

    Guards of dynamic shapes keep the mode alive that described the tensor, also where no backend was called; what
    Dynamo began anew or gave up lies about in cycles of garbage, for the finalisers of one collection to let go of what
    is the next one's. Looks through all objects, but only where something does refer to the tensor.
    """
    if weakref.getweakrefs(tensor):
        for each in gc.get_objects():
            if type(each) is MetaTensorDescriber:
                each.lookup_tensor.pop(tensor, None)
            elif type(each) is TracingContext:
                each.tensor_to_context.pop(tensor, None)
    for _ in range(4):
        if not weakref.getweakrefs(tensor):
            break
        gc.collect()


def cuda_answers(answers: Mapping[str, Callable[..., Any]]) -> list[tuple[Any, str, Any]]:
    """(owner, attribute, value) of what Dynamo and fake tensors ask CUDA devices, for one that is not there.

    `answers` are the functions that Dynamo's interface to CUDA takes from `torch.cuda`, by their names.
    """
    from torch._dynamo.device_interface import CudaInterface

    worker = ("get_device_properties", "current_device")
    return [
        *((CudaInterface, name, staticmethod(answer)) for name, answer in answers.items()),
        *((CudaInterface.Worker, name, staticmethod(answers[name])) for name in worker),
        (CudaInterface, "is_bf16_supported", lambda *_, **__: True),
        # Fake tensors would otherwise initialise the device that they are fakes of.
        (fake_tensor, "init_gpu_context", lambda *_, **__: None),
        (FakeTensorMode, "avoid_device_init", True),
    ]


@contextmanager
def without_fsdp_class(module: torch.nn.Module) -> Iterator[None]:
    """Inside, a module that FSDP2 (`fully_shard`) took has its own class, and may be given another."""
    fully_shard = sys.modules.get("torch.distributed.fsdp")
    if fully_shard is None or not isinstance(module, fully_shard.FSDPModule):
        yield
        return
    mixed = type(module)
    module.__class__ = mixed.__bases__[1]
    try:
        yield
    finally:
        own = type(module)
        kept = {name: each for name, each in vars(mixed).items() if name == "__deepcopy__"}
        module.__class__ = type(f"FSDP{own.__name__}", (fully_shard.FSDPModule, own), kept)


def parameter_moved(model: torch.nn.Module, old: tuple[torch.nn.Module, str], new: tuple[torch.nn.Module, str]) -> None:
    """Tell FSDP2 (`fully_shard`) that a parameter is an attribute of another module now: it sets it there."""
    fully_shard = sys.modules.get("torch.distributed.fsdp._fully_shard._fsdp_state")
    if fully_shard is None:
        return
    for module in model.modules():
        state = fully_shard._get_module_fsdp_state(module)
        group = None if state is None else state._fsdp_param_group
        for parameter in () if group is None else group.fsdp_params:
            info = parameter._module_info
            if info.module is old[0] and info.param_name == old[1]:
                info.module, info.param_name = new
