"""Call the wrapper that Inductor wrote for a GPU on CPU tensors, kernels left to whoever can run them."""

from __future__ import annotations

import re
from typing import Any

import torch


def call_wrapper(wrapper: str, inputs: list[Any], kernels: type) -> Any:
    """Execute a wrapper module with the GPU's entry points replaced, and call it.

    Args:
        wrapper: the module's text.
        inputs: of the graph, on the CPU.
        kernels: stands for Inductor's AsyncCompile.

    Returns:
        What the wrapper does. New buffers are full of NaN, so what is read unwritten shows.
    """
    text = re.sub(r"^from torch\._C import _cuda_getCurrentRawStream.*$", "", wrapper, flags=re.M)
    text = re.sub(r"^from torch\._inductor\.async_compile import AsyncCompile$", "", text, flags=re.M)
    names: dict[str, Any] = {"__name__": "wrapper", "AsyncCompile": kernels, "get_raw_stream": lambda index: 0}
    exec(compile(text, "wrapper", "exec"), names)
    names["empty_strided_cuda"] = _empty
    names["copy_if_misaligned"] = lambda tensor: tensor
    return names["call"](list(inputs))


def _empty(size: Any, stride: Any, dtype: torch.dtype) -> torch.Tensor:
    tensor = torch.empty_strided(size, stride, dtype=dtype)
    return tensor.fill_(float("nan")) if dtype.is_floating_point else tensor.fill_(77)
