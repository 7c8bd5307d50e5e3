"""Write a report to a folder: one folder a kernel, with a script that builds and runs that kernel alone."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from vnm_compile.filenames import file_name
from vnm_compile.hardware import Target
from vnm_compile.inspection.kernel import Kernel

_SCRIPT = Path(__file__).with_name("reproduce.py.txt")


def save_kernels(
    folder: Path, kernels: Iterable[Kernel], wrappers: Iterable[str], report: str, target: Target | None
) -> Path:
    """Write a report and the graphs' wrappers, and a folder a kernel: source, machine code, figures, a script.

    Args:
        folder: made where it is missing; returned.
        wrappers: the code that calls the kernels, one a graph.
        report: the text of `report.txt`.
        target: what the kernels were compiled for; None for the machine's CPU.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.txt").write_text(report)
    for i, wrapper in enumerate(wrappers):
        (folder / f"graph_{i}.py").write_text(wrapper)
    for kernel in kernels:
        _save_kernel(kernel, folder / file_name(kernel.name), target)
    return folder


def _save_kernel(kernel: Kernel, folder: Path, target: Target | None) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "figures.json").write_text(json.dumps(kernel.to_dict(), indent=2))
    if kernel.language == "cpp":
        (folder / "source.cpp").write_text(kernel.source)
        return
    (folder / "source.py").write_text(kernel.source)
    for name, text in (("kernel.ptx", kernel.ptx), ("kernel.sass", kernel.sass), ("kernel.amdgcn", kernel.amdgcn)):
        if text is not None:
            (folder / name).write_text(text)
    if kernel.binary is not None:
        suffix = "cubin" if kernel.ptx is not None else "hsaco"
        (folder / f"kernel.{suffix}").write_bytes(kernel.binary)
    if target is not None:
        script = _SCRIPT.read_text().replace("KERNEL_NAME", kernel.name)
        script = script.replace("GRAPH_NAME", f"graph_{kernel.graph}.py").replace("TARGET_NAME", target.name)
        (folder / "reproduce.py").write_text(script)
