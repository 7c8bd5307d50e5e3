"""What the commands share in showing what they did: text for people, or one JSON object on stdout."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape

from vnm_compile.checkpoint.directory import is_weight
from vnm_compile.names import printable

JSON = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]


@contextmanager
def working(what: str, as_json: bool) -> Iterator[None]:
    """Say on stderr what takes a while, where that is a terminal."""
    console = Console(stderr=True)
    if as_json or not console.is_terminal:
        yield
        return
    with console.status(escape(printable(what))):
        yield


def echo(report: Mapping[str, Any], as_json: bool, text: str) -> None:
    """Print a report, as JSON or as text; what it holds under "shown" is for the text."""
    if as_json:
        typer.echo(json.dumps({key: value for key, value in report.items() if key != "shown"}, indent=1))
    else:
        typer.echo(printable_lines(text))


def printable_lines(text: str) -> str:
    """A text with the control characters of every line spelled out."""
    return "\n".join(printable(line) for line in text.split("\n"))


def sizes(before: Path, after: Path) -> dict[str, Any]:
    """Bytes of the weight files of two directories."""
    old, new = weight_bytes(before), weight_bytes(after)
    return {"bytes_before": old, "bytes": new, "shown": f"{decimal(old)} became {decimal(new)}"}


def weight_bytes(directory: Path) -> int:
    """Bytes of the weights that transformers reads of a directory."""
    files = [path for path in directory.iterdir() if is_weight(path.name) and path.suffix != ".json"]
    chosen = [path for path in files if path.suffix == ".safetensors"] or files
    return sum(path.stat().st_size for path in chosen)
