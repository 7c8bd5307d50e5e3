"""`vnm-compile compress`, `decompress` and `convert`: the weights of a model directory stored otherwise."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from torch import nn

import vnm_compile as vnm
from vnm_compile.checkpoint.files import read_json
from vnm_compile.checkpoint.foreign import READERS, dense_state, kind_of
from vnm_compile.cli.directory import check_directory, load_model
from vnm_compile.cli.output import check_output, write_model
from vnm_compile.cli.shown import JSON, echo, sizes, working
from vnm_compile.errors import BadFile, NothingSelected
from vnm_compile.layers import linear_layers

if TYPE_CHECKING:
    from vnm_compile.integrations.transformers import VnmConfig

Model = Annotated[Path, typer.Argument(help="Directory of the model.", metavar="MODEL", show_default=False)]
Out = Annotated[Path, typer.Option(help="Directory to write to.", show_default=False)]
Force = Annotated[bool, typer.Option("--force", help="Replace a model that is in the output directory.")]
Pattern = Annotated[
    str | None, typer.Option(help='The pattern that the weights follow, such as "64:2:8"; looked for if not given.')
]
Selectors = Annotated[list[str] | None, typer.Option(help="Layer name or glob, repeatable.")]


def compress(
    model_dir: Model,
    out: Out,
    spec: Pattern = None,
    include: Selectors = None,
    exclude: Selectors = None,
    force: Force = False,
    as_json: JSON = False,
) -> None:
    """Store the V:N:M weights of a pruned model compressed.

    Weights that hold zeros where their pattern has none are looked for; the others stay as they are. The output loads
    with transformers once vnm_compile.integrations.transformers is imported.
    """
    check_output(out, model_dir, force)
    check_directory(model_dir)
    if read_json(model_dir / "config.json").get("quantization_config"):
        raise BadFile(f"{model_dir} is compressed already, or quantised; vnm-compile info says what it holds.")
    with working(f"loading {model_dir}", as_json):
        model = load_model(model_dir, _config(spec, include, exclude))
    _write(model, model_dir, out, as_json)


def decompress(model_dir: Model, out: Out, force: Force = False, as_json: JSON = False) -> None:
    """Store the compressed weights of a model as dense tensors with zeros, which any reader takes."""
    check_output(out, model_dir, force)
    with working(f"loading {model_dir}", as_json):
        model = load_model(model_dir)
    if not vnm.decompress_model(model):
        raise BadFile(f"{model_dir} holds no compressed weights.")
    with working(f"writing {out}", as_json):
        write_model(model, model_dir, out, {})
    report = {"out": str(out), **sizes(model_dir, out)}
    echo(report, as_json, f"dense: {report['shown']}; written to {out}")


def convert(
    model_dir: Model,
    out: Out,
    stored: Annotated[
        str | None, typer.Option("--from", help=f"How it is stored: {', '.join(READERS)}; found out if not given.")
    ] = None,
    spec: Pattern = None,
    include: Selectors = None,
    exclude: Selectors = None,
    force: Force = False,
    as_json: JSON = False,
) -> None:
    """Compress a sparse model that somebody else stored.

    Read are dense weights with zeros, compressed-tensors' sparse-24-bitmask (which its later versions cannot read) and
    torch's semi-structured weights.
    """
    check_output(out, model_dir, force)
    check_directory(model_dir)
    kind = stored or kind_of(model_dir, read_json(model_dir / "config.json"))
    with working(f"loading {model_dir}", as_json):
        model = load_model(model_dir, _config(spec, include, exclude), dense_state(model_dir, kind))
    _write(model, model_dir, out, as_json)


def _config(spec: str | None, include: list[str] | None, exclude: list[str] | None) -> VnmConfig:
    from vnm_compile.integrations.transformers import VnmConfig

    return VnmConfig(spec, include, exclude)


def _write(model: nn.Module, model_dir: Path, out: Path, as_json: bool) -> None:
    patterns = compressed_patterns(model)
    if not patterns:
        raise NothingSelected(
            f"no linear layer of {model_dir} follows a V:N:M pattern; prune it first (vnm-compile prune)."
        )
    with working(f"writing {out}", as_json):
        write_model(model, model_dir, out, {})
    report: dict[str, Any] = {"out": str(out), "layers": patterns, **sizes(model_dir, out)}
    found = ", ".join(f"{list(patterns.values()).count(each)} layers are {each}" for each in _in_order(patterns))
    echo(report, as_json, f"{found}: {report['shown']}; written to {out}")


def _in_order(patterns: dict[str, str]) -> list[str]:
    return list(dict.fromkeys(patterns.values()))


def compressed_patterns(model: nn.Module) -> dict[str, str]:
    """The pattern of each compressed layer, by its name."""
    found: dict[str, str] = {}
    for layer in linear_layers(model):
        weight: object = layer.stored
        if isinstance(weight, vnm.VNMTensor):
            found[layer.name] = str(weight.spec)
    return found
