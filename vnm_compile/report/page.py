"""The page: what is on it, and how it is written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from vnm_compile.comparison import Comparison
from vnm_compile.errors import BadFile
from vnm_compile.explanation.explanation import Explanation
from vnm_compile.hardware import Target
from vnm_compile.inspection.kernel import Kernel
from vnm_compile.inspection.kernel_report import KernelReport
from vnm_compile.names import printable
from vnm_compile.report.roofline import Roof, Series, kernel_points, layer_points, roofline

_TEMPLATE = "page.html.jinja"
_SPARSE, _DENSE = "#1b7f5c", "#b4552d"


@dataclass(frozen=True)
class Page:
    """A report as one HTML file, which needs nothing else to be shown.

    Attributes:
        title: such as the model's directory.
        explanation: what becomes of each layer.
        kernels: what was generated; None where nothing was.
        comparison: measured times; None where nothing was measured.
        inputs: what it was given, in words.
        facts: further figures, as name and text.
        dtype: of the model, for the roofline.
    """

    title: str
    explanation: Explanation
    kernels: KernelReport | None = None
    comparison: Comparison | None = None
    inputs: str = ""
    facts: Sequence[tuple[str, str]] = ()
    dtype: torch.dtype = field(default=torch.float32)

    def html(self) -> str:
        """The whole page.

        Raises:
            VNMError: matplotlib is not installed.
        """
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
        from markupsafe import Markup
        from rich.filesize import decimal

        environment = Environment(
            loader=FileSystemLoader(Path(__file__).parent),
            autoescape=True,  # names of layers come from outside
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        environment.filters |= {"bytes": decimal, "shown": printable}
        kernels, measured = self.kernels.kernels if self.kernels else [], self._measured()
        return environment.get_template(_TEMPLATE).render(
            page=self,
            totals=self.explanation.totals,
            layers=self.explanation.layers,
            kernels=[_kernel(each) for each in kernels],
            calls=self.kernels.library_calls if self.kernels else [],
            target=self._target,
            style=Markup(_highlighting()),
            plot=Markup(roofline(Roof.of(self._target, self.dtype), measured or self._at_best())),
            measured=bool(measured),
        )

    def save(self, path: str | Path) -> Path:
        """Write the page.

        Raises:
            VNMError: it cannot be written, or matplotlib is not installed.
        """
        text = self.html()
        try:
            Path(path).write_text(text, encoding="utf-8")
        except OSError as error:
            raise BadFile(f"the report cannot be written to {path}: {error}") from error
        return Path(path)

    @property
    def _target(self) -> Target | None:
        return self.kernels.target if self.kernels else None

    def _measured(self) -> list[Series]:
        """The sparse layers whose times are known on the machine that the page is about."""
        layers = [each for each in self.explanation.layers if each.decision == "sparse" and self._target is None]
        sparse, dense = (layer_points(layers, self.dtype.itemsize, sparse=each) for each in (True, False))
        return [("layers, sparse", _SPARSE, sparse), ("the same layers, dense", _DENSE, dense)] if sparse else []

    def _at_best(self) -> list[Series]:
        """The kernels, whose times are not known."""
        if self.kernels is None:
            return []
        rest = [each for each in self.kernels.kernels if each not in self.kernels.sparse]
        named = (("sparse kernels, at best", _SPARSE, self.kernels.sparse), ("other kernels, at best", _DENSE, rest))
        return [(label, colour, points) for label, colour, of in named if (points := kernel_points(of))]


def _kernel(kernel: Kernel) -> dict[str, Any]:
    from markupsafe import Markup

    ops = " ".join(dict.fromkeys(op.removeprefix("aten.") for op in kernel.fused_ops))
    return {**kernel.to_dict(), "ops": ops, "html": Markup(_highlighted(kernel.source, kernel.language))}


def _highlighted(source: str, language: str) -> str:
    from pygments import highlight
    from pygments.formatters import HtmlFormatter
    from pygments.lexers import get_lexer_by_name

    lexer = get_lexer_by_name("cpp" if language == "cpp" else "python")
    return highlight(source, lexer, HtmlFormatter(cssclass="code"))


def _highlighting() -> str:
    from pygments.formatters import HtmlFormatter

    light = HtmlFormatter(cssclass="code", style="default").get_style_defs(".code")
    dark = HtmlFormatter(cssclass="code", style="github-dark").get_style_defs(".code")
    return f"{light}\n@media (prefers-color-scheme: dark) {{\n{dark}\n}}"
