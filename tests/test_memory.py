"""A compiled model that is stored compressed keeps no dense weight, nor a second copy of the packed ones."""

from __future__ import annotations

import gc
import subprocess
import sys

import pytest
import torch
from torch import nn

import vnm_compile as vnm
from tests.support import make_sparse_


def live_bytes() -> int:
    """Bytes of all storages that tensors in this process hold."""
    gc.collect()
    storages = {}
    for each in gc.get_objects():
        if isinstance(each, torch.Tensor) and type(each) in (torch.Tensor, nn.Parameter) and each.device.type == "cpu":
            storage = each.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def measure(dtype: torch.dtype) -> None:
    """Compile a compressed model and check what stays; ends the process with an error where it is too much."""
    model = make_sparse_(nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(6))), "64:2:8").to(dtype).eval()
    before = live_bytes()
    vnm.compress_model(model)
    compressed = live_bytes()
    assert compressed < 0.35 * before
    compiled = torch.compile(model, backend="vnm", options={"vnm.policy": "memory"})
    x = torch.randn(8, 1024).to(dtype)
    with torch.no_grad():
        compiled(x)
        compiled(x)
    after = live_bytes() - x.nbytes
    assert after <= 1.1 * compressed, f"{after} bytes are held, {compressed} before compiling"


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_compiling_adds_no_copy_of_the_weights(dtype):
    code = f"import torch; from tests.test_memory import measure; measure(torch.{dtype})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
