"""The static model of tiles, held against what was timed on an H200 (benchmarks/results/gpu_tiles.json)."""

from __future__ import annotations

import json
import math
from itertools import groupby, product
from pathlib import Path
from typing import Any

import pytest
import torch

from vnm_compile.codegen.triton.configs import Config, Shape, configurations, seconds
from vnm_compile.codegen.triton.vector_configs import vector_configurations
from vnm_compile.hardware import TARGETS, find_target
from vnm_compile.layout import Layout
from vnm_compile.spec import Spec

TIMED = json.loads((Path(__file__).parents[3] / "benchmarks" / "results" / "gpu_tiles.json").read_text())["rows"]
H200 = find_target("sm_90")
SUM = 2.0  # us: the kernel that adds partial sums up


def shape(row: dict[str, Any]) -> Shape:
    layout = Layout(Spec.parse(row["spec"]), row["out"], row["in"])
    return Shape(row["tokens"], layout.rows, layout.groups, layout.spec, torch.bfloat16)


def problem(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["spec"], row["out"], row["in"], row["tokens"]


def on_tensor_cores() -> dict[tuple[Any, ...], list[dict[str, Any]]]:
    rows = sorted((row for row in TIMED if row["config"][1] > 1), key=problem)
    return {key: list(its) for key, its in groupby(rows, problem)}


def test_everything_timed_was_right():
    assert len(TIMED) > 400
    assert all(row["error"] < 2**-8 for row in TIMED)


@pytest.mark.parametrize("target", TARGETS)
def test_every_problem_has_a_configuration(target):
    """Where the rules of thumb leave none, the smallest that run: the reference unpacks the weight on every call."""
    for spec in ("16:2:8", "64:2:8", "128:2:32", "16:1:16", "64:1:16"):
        for dtype, tokens, gated in product((torch.bfloat16, torch.float32), (1, 16, 256, 4096), (False, True)):
            for groups in (1, 2, 8, 12, 16, 24, 32, 48, 80, 512):
                problem = Shape(tokens, 1024, groups, Spec.parse(spec), dtype, gated)
                found = configurations(problem, find_target(target))
                assert found, problem
                assert len({config.splits for config in found}) == 1


def test_estimates_are_near_what_was_timed():
    errors = [
        math.log(1e6 * seconds(Config(*row["config"]), shape(row), H200) / (row["us"] + SUM * (row["config"][5] > 1)))
        for rows in on_tensor_cores().values()
        for row in rows
    ]
    assert math.sqrt(sum(error**2 for error in errors) / len(errors)) < 0.25


@pytest.mark.parametrize("key", [key for key in on_tensor_cores() if 14336 in key], ids=str)
def test_what_is_measured_at_compile_time_holds_a_good_one(key):
    """Of the first four some were timed, and the best of those is near the best of all that were."""
    rows = on_tensor_cores()[key]
    cost = {Config(*row["config"]): row["us"] + SUM * (row["config"][5] > 1) for row in rows}
    first = [cost[config] for config in configurations(shape(rows[0]), H200)[:4] if config in cost]
    assert first
    assert min(first) < 1.2 * min(cost.values())


@pytest.mark.parametrize("groups", [16, 200, 512])
@pytest.mark.parametrize("v", [16, 24, 128])
def test_one_token_has_configurations_for_any_pattern(groups, v):
    found = vector_configurations(Shape(1, 240, groups, Spec(v, 2, 8), torch.bfloat16))
    assert found
    assert all(config.block_t == 1 and v % config.block_o == 0 for config in found)
