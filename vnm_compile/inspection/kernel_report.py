"""What `vnm.inspect` returns: the kernels' records and the layers', shown as a table or written to a folder."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vnm_compile.explanation.explanation import Explanation
from vnm_compile.hardware import Target
from vnm_compile.inspection.kernel import Kernel, LibraryCall
from vnm_compile.inspection.save import save_kernels
from vnm_compile.inspection.table import kernels_table, library_line
from vnm_compile.names import by_name
from vnm_compile.printing import Printed

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult


class KernelReport(Printed):
    """`print` it, or take `.kernels`, `.library_calls`, `.explanation`, `.wrappers`; `.save(folder)` writes files."""

    least_width = 175

    def __init__(
        self,
        kernels: Iterable[Kernel],
        library_calls: Iterable[LibraryCall],
        wrappers: Iterable[str],
        explanation: Explanation,
        target: Target | None,
    ) -> None:
        self.kernels, self.library_calls = list(kernels), list(library_calls)
        self.wrappers, self.explanation, self.target = list(wrappers), explanation, target

    def __getitem__(self, name: str) -> Kernel:
        """The kernel called `name`; an UnknownName (a VNMError and a KeyError) where there is none."""
        return by_name(name, self.kernels)

    @property
    def sparse(self) -> list[Kernel]:
        """The kernels that multiply by a V:N:M weight."""
        return [kernel for kernel in self.kernels if (kernel.template or "").startswith(("vnm_", "sparse_"))]

    def to_dict(self) -> dict[str, Any]:
        """Everything but sources and machine code as plain data, for JSON."""
        return {
            "target": self.target.name if self.target else None,
            "card": self.target.card if self.target else None,
            "kernels": [kernel.to_dict() for kernel in self.kernels],
            "library_calls": [asdict(call) for call in self.library_calls],
            "explanation": self.explanation.to_dict(),
        }

    def save(self, folder: str | Path) -> Path:
        """Write every kernel's source, machine code, figures and a script that runs it alone; return the folder."""
        text = f"{self}\n{self.explanation}\n"
        return save_kernels(Path(folder), self.kernels, self.wrappers, text, self.target)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.text import Text

        yield kernels_table(self.kernels, self.target)
        if self.library_calls:
            yield Text(library_line(self.library_calls))
