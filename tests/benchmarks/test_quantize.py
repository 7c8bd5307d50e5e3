"""The benchmark of quantised values, on the tiny model of the distillation's tests."""

from __future__ import annotations

import pytest

from benchmarks import quantize
from tests.benchmarks.test_distill import tiny  # noqa: F401 (a fixture)


@pytest.mark.slow
def test_rows(tiny):  # noqa: F811
    rows = list(quantize.run(*tiny, "16:2:8"))
    assert len(rows) == 1 + len(quantize.WAYS)
    floats, *quantised = rows
    errors = {(row.values, row.calibrated): row.error for row in quantised}
    assert all(error >= 0.99 * floats.error for error in errors.values())
    assert errors["int8/64", True] < 1.01 * floats.error
    assert errors["int4/64", True] < errors["int4/64", False] * 1.02
    assert all(row.bytes < floats.bytes for row in quantised)
    assert len(quantize.table(rows).splitlines()) == 2 + len(rows)
