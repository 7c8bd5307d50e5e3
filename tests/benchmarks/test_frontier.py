"""The frontier: which points are on it, what is chosen, the table, the plot, and going on after an interruption."""

from __future__ import annotations

import json

import pytest

from benchmarks import frontier
from benchmarks.frontier import Point


def point(spec, values, similarity, cpu, h200=2.0):
    return Point(spec, values, similarity, {str(t): cpu for t in frontier.TOKENS}, {"1": h200, "2048": h200})


POINTS = [
    point("64:2:8", "bf16", 0.75, 3.0, 1.5),
    point("64:2:8", "int8", 0.74, 4.0, 2.5),
    point("16:2:8", "bf16", 0.74, 2.5, 2.0),  # slower than the second and no better
    point("64:2:16", "int4", 0.55, 9.0, 2.0),
]


def test_the_front_has_no_point_that_another_beats():
    assert [each.spec for each in frontier.front(POINTS, "cpu")] == ["64:2:16", "64:2:8", "64:2:8"]
    assert [each.values for each in frontier.front(POINTS, "h200")] == ["int8", "bf16"]
    for device in ("cpu", "h200"):
        best = frontier.front(POINTS, device)
        for each in POINTS:
            beaten = any(
                o.speed(device) >= each.speed(device) and o.similarity >= each.similarity and o is not each
                for o in POINTS
            )
            assert (each in best) or beaten


def test_choices_are_fast_enough():
    assert frontier.choose(POINTS, "cpu", 3.5).values == "int8"
    assert frontier.choose(POINTS, "cpu", 1.0).values == "bf16"
    assert frontier.choose(POINTS, "cpu", 100) is None
    assert "4x: 64:2:8 int8 (0.740)" in frontier.choices(POINTS)


def test_the_table_and_the_plot(tmp_path):
    lines = frontier.table(POINTS).splitlines()
    assert len(lines) == 2 + 3
    assert lines[2].startswith("| 64:2:16 | int4 | 0.550 | 9.00 |")
    assert lines[3].endswith("| CPU, H200 |")
    frontier.plot(POINTS, tmp_path / "front.png")
    assert (tmp_path / "front.png").stat().st_size > 1000


def test_it_goes_on_where_it_was(tmp_path, monkeypatch):
    path = tmp_path / "frontier.json"
    rows = [vars(each) for each in POINTS[:1]]
    path.write_text(json.dumps({"rows": rows}))
    monkeypatch.setattr(frontier, "RESULTS", path)
    monkeypatch.setattr(frontier, "load", lambda: None)
    monkeypatch.setattr(frontier, "cpu_speeds", lambda spec: {values: {"1": 2.0} for values in frontier.VALUES})
    monkeypatch.setattr(frontier, "qualities", lambda data, spec, method: dict.fromkeys(frontier.VALUES, 0.5))
    found = list(frontier.points("magnitude", ["64:2:8", "16:2:4"], again=False))
    assert [(each.spec, each.values) for each in found] == [
        ("64:2:8", "bf16"), ("16:2:4", "bf16"), ("16:2:4", "int8"), ("16:2:4", "int4")
    ]  # fmt: skip
    assert len(list(frontier.points("magnitude", ["16:2:4"], again=True))) == 3


@pytest.mark.parametrize("values", frontier.VALUES)
def test_estimates_for_a_gpu(values):
    few, many = frontier.h200_speeds("128:2:16", values).values()
    assert 1 < many < 8
    assert 1 < few < 20
