"""`vnm-compile inspect`: the kernels that a model runs on a GPU, without the GPU, or here."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

import vnm_compile as vnm
from vnm_compile.cli.inputs import example_inputs
from vnm_compile.cli.models import BatchSize, Blocks, Inputs, Length, ModelOrConfig, Pattern, TargetName, sparse_model
from vnm_compile.cli.shown import JSON, echo, working
from vnm_compile.hardware import find_target


def inspect(
    model: ModelOrConfig,
    target: TargetName = None,
    spec: Pattern = None,
    batch_size: BatchSize = 1,
    length: Length = 128,
    blocks: Blocks = None,
    inputs: Inputs = None,
    save: Annotated[
        Path | None, typer.Option(help="Folder for every kernel's source, machine code and a script that runs it.")
    ] = None,
    as_json: JSON = False,
) -> None:
    """Show the kernels that a model compiles to: what is fused, registers, spills, bytes, least time.

    A config alone is enough: which kernels there are does not depend on the weights.
    """
    if target is not None:
        find_target(target)
    made = sparse_model(model, spec, blocks, as_json)
    given: dict[str, Any] = dict(example_inputs(made, batch_size, length, inputs))
    with working("generating kernels", as_json):
        report = vnm.inspect(made, target=target, **given)
    if save is not None:
        report.save(save)
    echo(report.to_dict(), as_json, f"{report}\n{report.explanation}")
