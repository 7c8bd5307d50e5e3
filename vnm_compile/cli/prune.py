"""`vnm-compile prune`: a model directory in, a V:N:M one out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import vnm_compile as vnm
from vnm_compile.cli.directory import check_directory, load_model
from vnm_compile.cli.inputs import load_batches
from vnm_compile.cli.method import method_with_options
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
from vnm_compile.errors import BadOption
from vnm_compile.quantization import VALUE_KINDS, Quantization
from vnm_compile.spec import Spec

REPORT = "pruning.json"


def prune(
    model_dir: ModelDirectory,
    spec: Annotated[str, typer.Option(help='Pattern, such as "64:2:8".', show_default=False)],
    out: Out,
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
    values: Annotated[
        str | None, typer.Option(help=f"Store what is kept as integers, too: {', '.join(VALUE_KINDS)}.")
    ] = None,
    group: Group = "64",
    include: Selectors = None,
    exclude: Selectors = None,
    samples: Samples = 256,
    length: PassageLength = 128,
    batch_size: PassagesAtOnce = 16,
    dense: Annotated[
        bool, typer.Option("--dense", help="Write dense tensors with zeros, which any reader takes.")
    ] = False,
    force: Force = False,
    as_json: JSON = False,
) -> None:
    """Prune a model into a V:N:M pattern, and store it compressed.

    The output is a directory as transformers reads it, once vnm_compile.integrations.transformers is imported: the
    pruned weights compressed, and everything else that the model's directory holds. What was pruned stands in its
    pruning.json.
    """
    pattern, chosen = Spec.parse(spec), method_with_options(method, option or ())
    size = group_size(group)
    _check_values(values, size, dense)
    check_output(out, model_dir, force)
    check_directory(model_dir)
    with working(f"loading {model_dir}", as_json):
        model = load_model(model_dir)
        vnm.decompress_model(model)  # what was pruned before may be pruned further
        batches = load_batches(calibration, model_dir, model, samples, length, batch_size) if calibration else None
    report = vnm.sparsify(
        model,
        pattern,
        chosen,
        include=include,
        exclude=exclude,
        calibration=batches,
        permute=permute,
        values=values,
        group=size,
        progress=not as_json,
    )
    if not dense:
        vnm.compress_model(model)
    with working(f"writing {out}", as_json):
        write_model(model, model_dir, out, {REPORT: report.to_dict()})
    found = sizes(model_dir, out)
    text = f"{report}\n{len(report.layers)} layers are {pattern}: {became(found)}; written to {out}"
    echo({**report.to_dict(), "out": str(out), **found}, as_json, text)


def _check_values(values: str | None, group: int | str, dense: bool) -> None:
    """Raise for what cannot be written, before anything is loaded."""
    if values is None:
        return
    if dense:
        raise BadOption("--dense writes floats, and --values integers; leave one of them out.")
    Quantization.of(values, group)
