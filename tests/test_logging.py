"""What torch's own logging and tracing show of a compilation."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from vnm_compile.passes import PASSES

CODE = """
import torch
from tests.support import make_sparse_
sparse = make_sparse_(torch.nn.Linear(128, 64), "16:2:8")
model = torch.nn.Sequential(sparse, torch.nn.Linear(64, 3)).eval()
with torch.no_grad():
    torch.compile(model, backend="vnm", options={"vnm.policy": "memory"})(torch.randn(2, 128))
"""


def run(**variables):
    done = subprocess.run(
        [sys.executable, "-c", CODE], capture_output=True, text=True, env={**os.environ, **variables}, check=True
    )
    return done.stderr


@pytest.mark.slow
def test_torch_logs_show_decisions_and_units():
    log = run(TORCH_LOGS="+vnm_compile")
    assert "16:2:8 (" in log
    assert "dense (" in log
    assert "single: " in log
    shown = [log.index(f"after {each.name}:") for each in PASSES]
    assert shown == sorted(shown)
    assert log.index("vnm_0_values") > shown[-1]
    assert "16:2:8 (" not in run()


def test_the_trace_holds_the_decisions_and_the_rewritten_graph(tmp_path):
    run(TORCH_TRACE=str(tmp_path))
    (trace,) = tmp_path.iterdir()
    text = trace.read_text()
    assert '"name": "vnm_decisions"' in text
    assert '"name": "vnm_graph"' in text
    assert "torch.ops.vnm.linear" in text
