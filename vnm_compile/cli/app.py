"""The commands, and what all of them share: how an error is shown.

A new command is one function in a module of its own, and one line at the end of this file.
"""

from __future__ import annotations

from typing import Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from vnm_compile.cli.explain import explain
from vnm_compile.cli.prune import prune
from vnm_compile.errors import VNMError


class Commands(TyperGroup):
    """A group of commands that shows a `VNMError` as one message, without a traceback, and exits with 1."""

    def invoke(self, ctx: Any) -> Any:
        """Run the chosen command."""
        try:
            return super().invoke(ctx)
        except VNMError as error:
            Console(stderr=True, highlight=False).print(f"[bold red]error:[/] {_escaped(error)}", soft_wrap=True)
            raise typer.Exit(1) from error


def _escaped(error: VNMError) -> str:
    from rich.markup import escape

    return escape(str(error))


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Make, check and explain V:N:M-sparse transformers. A model is a Hugging Face directory on this machine.",
)


@app.callback()
def _root() -> None:
    """Keep `vnm-compile COMMAND` even while there is a single command."""


app.command()(prune)
app.command()(explain)
