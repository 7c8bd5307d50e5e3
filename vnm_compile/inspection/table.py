"""How kernels are shown: a row each, with registers, loads and the least time a launch can take."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from vnm_compile.hardware import Target
from vnm_compile.inspection.assembly import Instructions
from vnm_compile.inspection.kernel import Kernel, LibraryCall
from vnm_compile.names import printable

if TYPE_CHECKING:  # imported when something is printed: compiling does not need it
    from rich.table import Table
    from rich.text import Text


def kernels_table(kernels: Sequence[Kernel], target: Target | None) -> Table:
    """A table with a row a kernel."""
    from rich.table import Table

    where = f"{target.name} ({target.card})" if target else "this machine's CPU"
    table = Table(title=f"kernels for {where}", title_justify="left", expand=False)
    table.add_column("kernel", overflow="fold", max_width=34)
    table.add_column("computes", overflow="fold", max_width=28)
    machine = ("registers", "spills", "shared", "tensor core", "loads by bytes")
    for column in ("runs", *machine, "MB", "floor us", "bound by", "estimate us"):
        table.add_column(column, justify="right", no_wrap=True)
    for kernel in kernels:
        table.add_row(*_row(kernel))
    return table


def library_line(calls: Iterable[LibraryCall]) -> str:
    """One line for all that Inductor did not generate."""
    return "not generated: " + ", ".join(f"{call.name} ({_short(call.fused_ops[-1:])})" for call in calls)


def _row(kernel: Kernel) -> list[str | Text]:
    from rich.text import Text

    moved = kernel.at_tokens(kernel.bytes_moved) / 1e6
    floor = kernel.roofline_seconds
    machine = ["", "", "", "", ""]
    if kernel.code and kernel.instructions:
        loads = " ".join(f"{width}:{times}" for width, times in kernel.instructions.loads.items())
        machine = [
            str(kernel.registers),
            str(kernel.spills),
            str(kernel.shared_bytes),
            _tensor_core(kernel.instructions),
            loads,
        ]
    time = f"{floor * 1e6:.2f}" if floor is not None else ""
    account = kernel.account
    told = [account.bound, f"{account.estimate * 1e6:.1f}"] if account else ["", ""]
    ops = Text(printable(_short(kernel.fused_ops)))
    return [Text(printable(kernel.name)), ops, str(kernel.launches), *machine, f"{moved:.2f}", time, *told]


def _tensor_core(counted: Instructions) -> str:
    kind = " sparse" if counted.sparse else ""
    return f"{counted.tensor_core}{kind}" if counted.tensor_core else ""


def _short(ops: Iterable[str]) -> str:
    return " ".join(dict.fromkeys(op.removeprefix("aten.") for op in ops))
