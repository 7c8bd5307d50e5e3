"""What a figure was measured on: ratios differ from one processor to the next."""

from __future__ import annotations

import platform
from contextlib import suppress
from pathlib import Path

import torch

# Server processors by vendor, family and model, for machines that hide their name; from the vendors' revision guides.
_CORES = {
    ("AuthenticAMD", 23): [(0x30, 0x3F, "Zen 2")],
    ("AuthenticAMD", 25): [(0x00, 0x0F, "Zen 3"), (0x10, 0x1F, "Zen 4"), (0xA0, 0xAF, "Zen 4c")],
    ("AuthenticAMD", 26): [(0x00, 0x1F, "Zen 5")],
    ("GenuineIntel", 6): [
        (0x55, 0x55, "Skylake or Cascade Lake"),
        (0x6A, 0x6A, "Ice Lake"),
        (0x8F, 0x8F, "Sapphire Rapids"),
        (0xCF, 0xCF, "Emerald Rapids"),
        (0xAD, 0xAD, "Granite Rapids"),
    ],
}


def processor() -> str:
    """The processor's name, its kind of core where that is known, and the instructions that torch uses of it."""
    said: dict[str, str] = {}
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            name, colon, value = line.partition(":")
            if colon:
                said.setdefault(name.strip(), value.strip())
    known = [said.get("model name") or platform.processor() or platform.machine()]
    with suppress(KeyError, ValueError):
        model = int(said["model"])
        cores = _CORES[said["vendor_id"], int(said["cpu family"])]
        known += [core for first, last, core in cores if first <= model <= last]
    return ", ".join([*known, torch.backends.cpu.get_cpu_capability()])


def machine() -> dict[str, str | int]:
    """What goes beside every figure of a CPU."""
    return {
        "cpu": processor(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
