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
    """Print a report as JSON, or the text, with the control characters of every line spelled out."""
    typer.echo(json.dumps(report, indent=1) if as_json else "\n".join(map(printable, text.split("\n"))))


def sizes(before: Path, after: Path) -> dict[str, int]:
    """Bytes of the weight files of two directories."""
    return {"bytes_before": weight_bytes(before), "bytes": weight_bytes(after)}


def became(found: Mapping[str, int]) -> str:
    """What `sizes` found, in words."""
    return f"{decimal(found['bytes_before'])} became {decimal(found['bytes'])}"


def weight_bytes(directory: Path) -> int:
    """Bytes of the weights that transformers reads of a directory."""
    files = [path for path in directory.iterdir() if is_weight(path.name) and path.suffix != ".json"]
    chosen = [path for path in files if path.suffix == ".safetensors"] or files
    return sum(path.stat().st_size for path in chosen)
