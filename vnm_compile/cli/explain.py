"""`vnm-compile explain`: which layers of a model directory are V:N:M, and what that is worth."""

from __future__ import annotations

import vnm_compile as vnm
from vnm_compile.cli.directory import load_model
from vnm_compile.cli.models import ModelDirectory
from vnm_compile.cli.shown import JSON, echo


def explain(
    model_dir: ModelDirectory,
    as_json: JSON = False,
) -> None:
    """Say layer by layer which V:N:M pattern the weights follow, what they take and how fast they can be at best."""
    explanation = vnm.explain(load_model(model_dir))
    echo(explanation.to_dict(), as_json, str(explanation))
