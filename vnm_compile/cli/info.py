"""`vnm-compile info`: what the weight files of a directory hold, by their headers alone."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.filesize import decimal

from vnm_compile.checkpoint.files import Checkpoint, open_checkpoint
from vnm_compile.checkpoint.flat import VERSION, array_name
from vnm_compile.cli.shown import JSON, echo
from vnm_compile.names import printable


def info(
    directory: Annotated[Path, typer.Argument(help="Directory of a model, or a .safetensors file.")],
    layers: Annotated[bool, typer.Option("--layers", help="List the compressed weights.")] = False,
    as_json: JSON = False,
) -> None:
    """Say what a model directory holds: patterns, sizes, files. Only headers are read; they are checked."""
    with open_checkpoint(directory) as found:
        report = _report(found)
    echo(report, as_json, _text(report, layers))


def _report(found: Checkpoint) -> dict[str, Any]:
    weights = []
    for name, stored in found.weights.items():
        dtype = found.tensors[array_name(name, stored.layout.typed)][1]
        kind: torch.dtype = getattr(torch, dtype)
        dense = stored.layout.out_features * stored.layout.in_features * kind.itemsize
        weights.append(
            {
                "name": name,
                "spec": str(stored.layout.spec),
                "values": str(stored.layout.quantization) if stored.layout.quantization else None,
                "shape": list(stored.shape),
                "dtype": dtype,
                "bytes": stored.layout.nbytes(kind),
                "dense_bytes": dense,
            }
        )
    return {
        "format_version": VERSION if weights else None,
        "files": [{"name": path.name, "bytes": path.stat().st_size} for path in found.files],
        "compressed": weights,
        "other_tensors": len(found.plain),
    }


def _text(report: dict[str, Any], layers: bool) -> str:
    weights, on_disk = report["compressed"], sum(file["bytes"] for file in report["files"])
    files = f"{len(report['files'])} file{'s' * (len(report['files']) > 1)}, {decimal(on_disk)}"
    if not weights:
        return f"{files}; no compressed weights, {report['other_tensors']} tensors."
    stored, dense = (sum(each[key] for each in weights) for key in ("bytes", "dense_bytes"))
    patterns = Counter((_stored_as(each), each["dtype"]) for each in weights)
    lines = [f"{files}; format version {report['format_version']}."]
    lines += [f"{count} weights are {spec} of {dtype}" for (spec, dtype), count in patterns.most_common()]
    lines.append(f"They take {decimal(stored)}, {decimal(dense)} dense; {report['other_tensors']} other tensors.")
    if layers:
        for each in weights:
            name, (rows, columns) = printable(each["name"]), each["shape"]
            lines.append(f"  {name}  {rows} x {columns}  {_stored_as(each)}  {decimal(each['bytes'])}")
    return "\n".join(lines)


def _stored_as(weight: dict[str, Any]) -> str:
    return f"{weight['spec']} {weight['values']}" if weight["values"] else str(weight["spec"])
