"""`vnm-compile bench`: what a model gains on this machine."""

from __future__ import annotations

from typing import Annotated

import torch
import typer

from vnm_compile.cli.inputs import example_inputs
from vnm_compile.cli.models import BatchSize, Blocks, Inputs, Length, ModelOrConfig, Pattern, sparse_model
from vnm_compile.cli.shown import JSON, echo, working


def bench(
    model: ModelOrConfig,
    spec: Pattern = None,
    batch_size: BatchSize = 1,
    length: Length = 128,
    blocks: Blocks = None,
    inputs: Inputs = None,
    seconds: Annotated[float, typer.Option(help="Seconds of timing, after compiling.", min=0.1)] = 3.0,
    policy: Annotated[
        str, typer.Option(help='"latency" keeps a layer dense where that is faster, "memory" does not.')
    ] = "latency",
    as_json: JSON = False,
) -> None:
    """Time a model on this machine: torch.compile dense against the sparse kernels, taking turns on the same inputs.

    A config alone is enough: times do not depend on the weights. With a GPU it runs there.
    """
    from vnm_compile.comparison import compare_model  # and with it Inductor

    made = sparse_model(model, spec, blocks, as_json)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    given = {name: value.to(device) for name, value in example_inputs(made, batch_size, length, inputs).items()}
    with working("compiling and timing", as_json):
        found = compare_model(made.to(device), given, policy=policy, seconds=seconds)
    echo(found.to_dict(), as_json, f"{found.explanation}\n{found}")
