"""Options that several commands share, and the model they are about: one with weights, or a config filled at random."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from torch import nn

import vnm_compile as vnm
from vnm_compile.cli.directory import has_weights, load_model, random_model
from vnm_compile.cli.shown import working
from vnm_compile.convert import compressed_layers
from vnm_compile.errors import BadFile, BadOption
from vnm_compile.hardware import TARGETS
from vnm_compile.layers import Layer, linear_layers
from vnm_compile.quantization import GROUPS
from vnm_compile.weights import detected_spec

ModelDirectory = Annotated[Path, typer.Argument(help="Directory of the model.", metavar="MODEL", show_default=False)]
Out = Annotated[Path, typer.Option(help="Directory to write to.", show_default=False)]
Force = Annotated[bool, typer.Option("--force", help="Replace a model that is in the output directory.")]
Selectors = Annotated[list[str] | None, typer.Option(help="Layer name or glob, repeatable.")]

ModelOrConfig = Annotated[
    Path,
    typer.Argument(
        help="Directory of a model, or a config.json alone: random weights then.", metavar="MODEL", show_default=False
    ),
]
Pattern = Annotated[
    str | None,
    typer.Option(help='Pattern to prune dense weights to first, such as "64:2:8"; 64:2:8 for a config alone.'),
]
Blocks = Annotated[int | None, typer.Option(help="Of a config alone: how many blocks to make.", min=1)]
BatchSize = Annotated[int, typer.Option(help="Sequences, or images.", min=1)]
Length = Annotated[int, typer.Option(help="Tokens a sequence.", min=1)]
Inputs = Annotated[
    Path | None, typer.Option(help="A .safetensors file of model inputs; random ones if not given.", show_default=False)
]

Group = Annotated[str, typer.Option(help=f"Kept values that share a scale: {', '.join(map(str, GROUPS))}, or row.")]
Samples = Annotated[int, typer.Option(help="Passages of calibration data.", min=1)]
PassageLength = Annotated[int, typer.Option(help="Tokens a passage.", min=1)]
PassagesAtOnce = Annotated[int, typer.Option(help="Passages that run at a time.", min=1)]

TargetName = Annotated[
    str | None, typer.Option(help=f"GPU architecture: {', '.join(TARGETS)}; this machine if not given.")
]

_USUAL = "64:2:8"


def group_size(text: str) -> int | str:
    """What `vnm.quantize` takes for a group that was given as text."""
    return int(text) if text.isdecimal() else text


def sparse_model(path: Path, spec: str | None, blocks: int | None, as_json: bool) -> nn.Module:
    """The model that a command measures, with V:N:M weights.

    Args:
        path: directory of a model, or a config alone.
        spec: pattern that dense weights are pruned to in memory; what is measured is their speed.
        blocks: of a config alone, how many.
        as_json: nothing is shown meanwhile.

    Raises:
        VNMError: there is neither, or no weight follows a pattern and none was given.
    """
    if not path.exists():
        raise BadFile(f"there is no {path}; give the directory of a model, or a config.json.")
    alone = path.is_file() or not has_weights(path)
    with working(f"loading {path}", as_json):
        if blocks is not None and not alone:
            raise BadOption("--blocks is for a config alone; this directory has weights.")
        model = random_model(path, blocks) if alone else load_model(path)
    if alone or spec is not None:
        if compressed_layers(model):
            raise BadOption(f"--spec: the weights of {path} are compressed already, in patterns of their own.")
        vnm.sparsify(model, spec or _USUAL, progress=not as_json)
    elif not compressed_layers(model) and not any(map(_follows, linear_layers(model))):
        raise BadOption(f'no weight of {path} follows a V:N:M pattern; give --spec, such as "{_USUAL}", to try one.')
    return model


def _follows(layer: Layer) -> bool:
    return layer.stored is not None and detected_spec(layer.stored, layer.transposed) is not None
