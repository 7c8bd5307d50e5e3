"""Compiling and inspecting need torch, Triton, sympy and numpy only: GPU images often have nothing else."""

from __future__ import annotations

import subprocess
import sys

import pytest

CODE = """
import sys
for name in ("rich", "safetensors", "scipy", "matplotlib", "typer", "transformers", "peft"):
    sys.modules[name] = None
import torch
import vnm_compile as vnm
import benchmarks.gpu
model = torch.nn.Sequential(torch.nn.Linear(256, 64)).eval()
vnm.annotate(model, "16:2:4")
with torch.no_grad():
    weight = model[0].weight.view(64, 64, 4)
    weight[:, :, :2] = 0
    compiled = torch.compile(model, backend="vnm", options={"vnm.policy": "memory"})
    x = torch.randn(3, 256)
    torch.testing.assert_close(compiled(x), model(x))
report = vnm.inspect(model, x, target="sm_90")
assert [kernel.spills for kernel in report.sparse] == [0]
print("compiled and inspected")
"""


LATE = """
import sys
import vnm_compile as vnm
import vnm_compile.cli.app
import vnm_compile.integrations.transformers
assert "torch._inductor.lowering" not in sys.modules
assert "vnm_compile.backend" not in sys.modules
assert set(vnm.__all__) <= set(dir(vnm))
assert all(callable(getattr(vnm, name)) for name in vnm.__all__)
assert "torch._inductor.lowering" in sys.modules
print("late")
"""


def test_inductor_is_imported_when_something_compiles():
    """It takes as long as torch; pruning, saving and the command line's help do without."""
    result = subprocess.run([sys.executable, "-c", LATE], capture_output=True, text=True)
    assert result.stdout == "late\n", result.stderr


@pytest.mark.slow
def test_optional_packages_are_optional():
    result = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True)
    assert result.stdout == "compiled and inspected\n", result.stderr
