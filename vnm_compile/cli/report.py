"""`vnm-compile report`: all that is known of a model's gain, on one HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.filesize import decimal

import vnm_compile as vnm
from vnm_compile.cli.directory import has_weights
from vnm_compile.cli.inputs import example_inputs
from vnm_compile.cli.models import BatchSize, Blocks, Inputs, Length, ModelOrConfig, Pattern, TargetName, sparse_model
from vnm_compile.cli.shown import JSON, echo, weight_bytes, working
from vnm_compile.errors import BadFile
from vnm_compile.hardware import find_target


def report(
    model: ModelOrConfig,
    out: Annotated[Path, typer.Option(help="The HTML file to write.", show_default=False)],
    target: TargetName = None,
    spec: Pattern = None,
    batch_size: BatchSize = 1,
    length: Length = 128,
    blocks: Blocks = None,
    inputs: Inputs = None,
    measured: Annotated[bool, typer.Option("--bench/--no-bench", help="Time the model on this machine.")] = True,
    force: Annotated[bool, typer.Option("--force", help="Replace the file.")] = False,
    as_json: JSON = False,
) -> None:
    """Write one HTML page: layers and why, times, a roofline plot, every kernel's source."""
    from vnm_compile.comparison import compare_model  # and with it Inductor
    from vnm_compile.report import Page

    if out.exists() and not force:
        raise BadFile(f"{out} exists; choose another name, or replace it with --force.")
    if target is not None:
        find_target(target)
    made = sparse_model(model, spec, blocks, as_json)
    given: dict[str, Any] = dict(example_inputs(made, batch_size, length, inputs))
    with working("generating kernels", as_json):
        kernels = vnm.inspect(made, target=target, **given)
    with working("compiling and timing", as_json):
        comparison = compare_model(made, given) if measured else None
    explanation = comparison.explanation if comparison and target is None else kernels.explanation
    facts = [("weight files", decimal(weight_bytes(model)))] if model.is_dir() and has_weights(model) else []
    shape = ", ".join(f"{name} {' x '.join(map(str, value.shape))}" for name, value in given.items())
    dtype = next(parameter.dtype for parameter in made.parameters() if parameter.is_floating_point())
    title = model.resolve().name if model.is_dir() else f"{model} (random weights)"
    Page(title, explanation, kernels, comparison, shape, facts, dtype).save(out)
    echo({"out": str(out), "bytes": out.stat().st_size}, as_json, f"written to {out}")
