"""`vnm-compile compress`, `decompress` and `convert`: the weights of a model directory stored otherwise."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from torch import nn

import vnm_compile as vnm
from vnm_compile.checkpoint.files import read_json
from vnm_compile.checkpoint.foreign import READERS, dense_state, kind_of
from vnm_compile.cli.directory import check_directory, load_model
from vnm_compile.cli.models import Force, ModelDirectory, Out, Selectors
from vnm_compile.cli.output import check_output, write_model
from vnm_compile.cli.shown import JSON, became, echo, sizes, working
from vnm_compile.convert import compressed_layers
from vnm_compile.errors import BadFile, NothingSelected

if TYPE_CHECKING:
    from vnm_compile.integrations.transformers import VnmConfig

Pattern = Annotated[
    str | None, typer.Option(help='The pattern that the weights follow, such as "64:2:8"; looked for if not given.')
]


def compress(
    model_dir: ModelDirectory,
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


def decompress(model_dir: ModelDirectory, out: Out, force: Force = False, as_json: JSON = False) -> None:
    """Store the compressed weights of a model as dense tensors with zeros, which any reader takes."""
    check_output(out, model_dir, force)
    with working(f"loading {model_dir}", as_json):
        model = load_model(model_dir)
    if not vnm.decompress_model(model):
        raise BadFile(f"{model_dir} holds no compressed weights.")
    with working(f"writing {out}", as_json):
        write_model(model, model_dir, out, {})
    found = sizes(model_dir, out)
    echo({"out": str(out), **found}, as_json, f"dense: {became(found)}; written to {out}")


def convert(
    model_dir: ModelDirectory,
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
    weights = {layer.name: layer.stored for layer in compressed_layers(model)}
    if not weights:
        raise NothingSelected(
            f"no linear layer of {model_dir} follows a V:N:M pattern; prune it first (vnm-compile prune)."
        )
    patterns = {name: str(weight.spec) for name, weight in weights.items()}  # type: ignore[union-attr]
    with working(f"writing {out}", as_json):
        write_model(model, model_dir, out, {})
    found = sizes(model_dir, out)
    counted = ", ".join(f"{count} layers are {spec}" for spec, count in Counter(patterns.values()).items())
    report = {"out": str(out), "layers": patterns, **found}
    echo(report, as_json, f"{counted}: {became(found)}; written to {out}")
