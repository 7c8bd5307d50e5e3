"""`vnm-compile explain`: which layers of a model directory are V:N:M, and what that is worth."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

import vnm_compile as vnm
from vnm_compile.cli.directory import load_model


def explain(
    model_dir: Annotated[Path, typer.Argument(help="Directory of the model.", metavar="MODEL", show_default=False)],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Say layer by layer which V:N:M pattern the weights follow, what they take and how fast they can be at best."""
    explanation = vnm.explain(load_model(model_dir))
    typer.echo(json.dumps(explanation.to_dict(), indent=1) if as_json else str(explanation))
