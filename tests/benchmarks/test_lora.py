"""The benchmark of three-staged LoRA, in a few steps."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from benchmarks import lora
from benchmarks.training_tasks import TASKS

pytest.importorskip("peft")


@pytest.mark.slow
def test_every_way():
    rows = lora.run(TASKS["digits"], seed=0, dense_steps=60, steps=40)
    assert [row.way for row in rows] == ["dense", *lora.WAYS]
    trained = {row.trained for row in rows if "LoRA" in row.way}
    assert len(trained) == 1, "equal trainable parameters"
    assert lora.closed(rows, 0, "three-staged LoRA") > 0
    lines = lora.table(rows).splitlines()
    assert len(lines) == 2 + len(rows)


@pytest.mark.slow
def test_memory_of_a_step():
    command = [sys.executable, "-m", "benchmarks.lora", "--memory-of", "three-staged LoRA, masks"]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert found["masks"] == 4 * (4 * 1024 * 1024 + 2 * 1024 * 4096)
    assert found["peak"] > found["masks"]
    assert len(lora.memory_table({"a": found}).splitlines()) == 3


def test_the_share_of_the_gap():
    rows = [
        lora.Row(way, 0, 0, 0, loss, 0.0)
        for way, loss in (("dense", 1.0), ("LoRA, dense", 0.5), ("one shot", 3.0), ("three-staged LoRA", 1.5))
    ]
    assert lora.closed(rows, 0, "three-staged LoRA", "dense") == 0.75
    assert lora.closed(rows, 0, "three-staged LoRA") == 0.6
