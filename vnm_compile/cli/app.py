"""The commands, and what all of them share: how an error is shown.

A new command is one function in a module of its own, and one line at the end of this file.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import torch
import typer
from rich.console import Console
from rich.text import Text
from typer.core import TyperGroup

from vnm_compile.cli.bench import bench
from vnm_compile.cli.compress import compress, convert, decompress
from vnm_compile.cli.explain import explain
from vnm_compile.cli.info import info
from vnm_compile.cli.inspect import inspect
from vnm_compile.cli.prune import prune
from vnm_compile.cli.quantize import quantize
from vnm_compile.cli.report import report
from vnm_compile.errors import VNMError
from vnm_compile.names import printable


class Commands(TyperGroup):
    """A group of commands that shows an error as one sentence on stderr, without a traceback, and exits with 1.

    Shown so are a `VNMError`, and what the machine says of files and memory.
    """

    def invoke(self, ctx: Any) -> Any:
        """Run the chosen command."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError:  # whoever reads has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(0) from None
        except (VNMError, OSError, MemoryError, torch.OutOfMemoryError) as error:
            said = str(error).strip() or type(error).__name__
            shown = Text.assemble(("error:", "bold red"), " ", printable(" ".join(said.split())))
            Console(stderr=True, highlight=False).print(shown, soft_wrap=True)
            raise typer.Exit(1) from error


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",  # paragraphs of docstrings flow
    help="Make, check and explain V:N:M-sparse transformers. A model is a Hugging Face directory on this machine.",
)


@app.callback()
def _root() -> None:
    """Keep `vnm-compile COMMAND` even while there is a single command."""


for _command in (prune, quantize, compress, decompress, convert, info, explain, inspect, bench, report):
    app.command()(_command)
