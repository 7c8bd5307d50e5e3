"""Masks under DDP and FSDP2: two processes come to the weights that one comes to."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize("way", ["ddp", "fsdp2"])
def test_two_processes_train_as_one(way, tmp_path):
    command = [sys.executable, "-m", "tests.train.ranks", way]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for rank in range(2)
    ]
    told = [rank.communicate(timeout=240)[0] for rank in ranks]
    for text in told:
        assert text.endswith("right\n"), text
