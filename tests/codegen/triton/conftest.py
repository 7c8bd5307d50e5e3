"""One interpreting process for all tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.codegen.triton.interpreter import Interpreter


@pytest.fixture(scope="package")
def interpreter() -> Iterator[Interpreter]:
    process = Interpreter()
    yield process
    process.close()
