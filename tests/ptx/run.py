"""Run what Inductor wrote for an NVIDIA GPU in the PTX interpreter: the wrapper, with all its kernels."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch

from tests.codegen.triton.wrapper import call_wrapper
from tests.ptx.launch import Launch, compiled


@dataclass
class Run:
    """What a wrapper has done: its outputs, its launches in order, and the faults that were noted and not raised."""

    outputs: list[torch.Tensor]
    launches: list[Launch]
    hazards: set[str]


def run(wrapper: str, inputs: Sequence[Any], target: str, late: bool = True) -> Run:
    """Carry out a wrapper module for CPU inputs.

    Args:
        wrapper: the module's text.
        inputs: of the graph.
        target: what its kernels are compiled for.
        late: whether asynchronous work is done as late as it may be, or as early.

    Raises:
        PTXError: a kernel does what a device would not forgive.
        NotModelled: a kernel uses what the interpreter does not know.
    """
    done = Run([], [], set())
    before = [each.clone() for each in inputs]

    class Kernels:
        """Stands for Inductor's AsyncCompile."""

        def triton(self, name: str, source: str, device_str: str = "cuda") -> Any:
            return _Function(name, source)

        def wait(self, names: dict[str, Any]) -> None:
            pass

    class _Function:
        def __init__(self, name: str, source: str) -> None:
            self.kernel = compiled(name, source, target)

        def run(self, *arguments: Any, stream: Any) -> None:
            launch = Launch.of(self.kernel, arguments)
            done.hazards |= {fault for fault, _ in launch.run(late).hazards}
            done.launches.append(launch)

    with (
        torch.no_grad(),
        patch.object(torch.cuda, "_DeviceGuard", lambda index: nullcontext()),
        patch.object(torch.cuda, "set_device", lambda index: None),
    ):
        done.outputs = list(call_wrapper(wrapper, list(inputs), Kernels))
    for given, kept in zip(inputs, before, strict=True):
        assert torch.equal(given.view(torch.uint8), kept.view(torch.uint8)), "an input has been written to"
    return done
