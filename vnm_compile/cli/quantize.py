"""`vnm-compile quantize`: a pruned model directory in, one whose kept values are integers out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import vnm_compile as vnm
from vnm_compile.cli.directory import check_directory, load_model
from vnm_compile.cli.inputs import load_batches
from vnm_compile.cli.models import (
    Force,
    Group,
    ModelDirectory,
    Out,
    PassageLength,
    PassagesAtOnce,
    Samples,
    Selectors,
    group_size,
)
from vnm_compile.cli.output import check_output, write_model
from vnm_compile.cli.shown import JSON, became, echo, sizes, working
from vnm_compile.quantization import VALUE_KINDS, Quantization

REPORT = "quantising.json"


def quantize(
    model_dir: ModelDirectory,
    out: Out,
    values: Annotated[str, typer.Option(help=f"One of {', '.join(VALUE_KINDS)}.")] = "int8",
    group: Group = "64",
    activations: Annotated[
        str | None, typer.Option(help="int8 to round the layers' inputs, too, when they run.")
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(
            help="Text, or a .safetensors file of model inputs; rounding errors then cancel as far as can be."
        ),
    ] = None,
    include: Selectors = None,
    exclude: Selectors = None,
    samples: Samples = 256,
    length: PassageLength = 128,
    batch_size: PassagesAtOnce = 16,
    force: Force = False,
    as_json: JSON = False,
) -> None:
    """Store what a pruned model keeps as integers of 8 or 4 bits with scales.

    The output loads with transformers once vnm_compile.integrations.transformers is imported. What rounding changed
    stands in its quantising.json.
    """
    size = group_size(group)
    Quantization.of(values, size, activations)  # before anything is loaded
    check_output(out, model_dir, force)
    check_directory(model_dir)
    with working(f"loading {model_dir}", as_json):
        model = load_model(model_dir)
        batches = load_batches(calibration, model_dir, model, samples, length, batch_size) if calibration else None
    report = vnm.quantize(
        model,
        values,
        size,
        activations=activations,
        calibration=batches,
        include=include,
        exclude=exclude,
        progress=not as_json,
    )
    with working(f"writing {out}", as_json):
        write_model(model, model_dir, out, {REPORT: report.to_dict()})
    found = sizes(model_dir, out)
    text = f"{report}\n{became(found)}; written to {out}"
    echo({**report.to_dict(), "out": str(out), **found}, as_json, text)
