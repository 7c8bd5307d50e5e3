"""What pruning needs beside the model, measured as resident memory in a process of its own, and what it keeps."""

from __future__ import annotations

import subprocess
import sys

import pytest

CODE = """
import sys, threading, time
import torch, vnm_compile as vnm
from torch import nn
torch.set_num_threads(1)
def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096
method = sys.argv[1]
def model(layers):
    return nn.Sequential(*(nn.Linear(1024, 512 if i % 2 == 0 else 1024, bias=False) if i % 2 == 0
                           else nn.Linear(512, 1024, bias=False) for i in range(layers))).eval()
x = [torch.randn(64, 1024)]
vnm.sparsify(model(2), "64:2:8", method, calibration=x, progress=False)  # what is imported, once
net = model(56)
size = sum(p.numel() * 4 for p in net.parameters())
before, most, done = resident(), 0, False
def watch():
    global most
    while not done:
        most = max(most, resident())
        time.sleep(0.002)
thread = threading.Thread(target=watch)
thread.start()
report = vnm.sparsify(net, "64:2:8", method, calibration=x, progress=False)
done = True
thread.join()
print((most - before) / size, (resident() - before) / size)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_pruning_needs_about_the_kept_share_and_keeps_nothing():
    """The weights kept packed are 27 % of the model, the search works on slabs; a copy of the model would be 100 %."""
    done = subprocess.run([sys.executable, "-c", CODE, "magnitude"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    most, kept = map(float, done.stdout.split())
    assert most < 0.9, f"peak +{most:.0%} of the model"
    assert kept < 0.25, f"{kept:.0%} of the model kept"
