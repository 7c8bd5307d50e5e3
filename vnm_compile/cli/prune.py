"""`vnm-compile prune`: a model directory in, a V:N:M one out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

import vnm_compile as vnm
from vnm_compile.cli.directory import check_directory, load_model
from vnm_compile.cli.inputs import load_batches
from vnm_compile.cli.method import method_with_options
from vnm_compile.cli.output import check_output, write_model
from vnm_compile.spec import Spec

REPORT = "pruning.json"

Selectors = Annotated[list[str] | None, typer.Option(help="Layer name or glob, repeatable.")]


def prune(
    model_dir: Annotated[Path, typer.Argument(help="Directory of the model.")],
    spec: Annotated[str, typer.Option(help='Pattern, such as "64:2:8".')],
    out: Annotated[Path, typer.Option(help="Directory to write to.")],
    method: Annotated[str, typer.Option(help=f"One of {', '.join(vnm.prune.METHODS)}.")] = "magnitude",
    option: Annotated[
        list[str] | None, typer.Option(help='Of the method, such as "damping=0.02", repeatable.', metavar="NAME=VALUE")
    ] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="Text, or a .safetensors file of model inputs; most methods need it.")
    ] = None,
    permute: Annotated[
        bool, typer.Option("--permute", help="Reorder channels first; outputs stay the same. Needs --calibration.")
    ] = False,
    include: Selectors = None,
    exclude: Selectors = None,
    samples: Annotated[int, typer.Option(help="Passages of calibration data.", min=1)] = 256,
    length: Annotated[int, typer.Option(help="Tokens a passage.", min=1)] = 128,
    batch_size: Annotated[int, typer.Option(help="Passages that run at a time.", min=1)] = 16,
    force: Annotated[bool, typer.Option("--force", help="Replace a model that is in the output directory.")] = False,
) -> None:
    """Prune a model into a V:N:M pattern.

    The output is a directory as transformers reads it: the pruned weights as dense tensors with zeros, and everything
    else that the model's directory holds. What was pruned stands in its pruning.json.
    """
    pattern, chosen = Spec.parse(spec), method_with_options(method, option or ())
    check_output(out, model_dir, force)
    check_directory(model_dir)
    console = Console()
    with console.status(escape(f"loading {model_dir}")):
        model = load_model(model_dir)
        batches = load_batches(calibration, model_dir, model, samples, length, batch_size) if calibration else None
    report = vnm.sparsify(
        model, pattern, chosen, include=include, exclude=exclude, calibration=batches, permute=permute
    )
    with console.status(escape(f"writing {out}")):
        write_model(model, model_dir, out, {REPORT: report.to_dict()})
    typer.echo(str(report))
    typer.echo(f"{len(report.layers)} layers are {pattern}; written to {out}")
