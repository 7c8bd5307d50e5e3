"""What policy "latency" decides by: fair, kept, and touched by nothing that the caller is doing."""

from __future__ import annotations

import errno
import json
import os
import random
import threading
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._inductor.cpp_builder import CppBuilder
from torch._inductor.utils import fresh_cache
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import vnm_compile as vnm
from tests.support import make_sparse_
from vnm_compile.codegen import measure as measuring
from vnm_compile.codegen import timings
from vnm_compile.layout import Layout
from vnm_compile.problem import Failure, Problem, Timing
from vnm_compile.spec import Spec


def problem(tokens=4, out_features=32, in_features=64, spec="16:2:8", dtype=torch.float32):
    return Problem(tokens, Layout(Spec.parse(spec), out_features, in_features), dtype, torch.device("cpu"))


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch, tmp_path):
    monkeypatch.setattr(measuring, "_known", {})
    monkeypatch.setattr(timings, "cache_dir", lambda: tmp_path)
    monkeypatch.setattr(measuring, "_MOST_COPIES", {"cpu": 4})


@pytest.fixture
def timed(monkeypatch):
    """The problems that were timed, in place of timing them."""
    seen: list[Problem] = []
    monkeypatch.setattr(measuring, "_time", lambda each: seen.append(each) or Timing(1e-6, 2e-6))
    return seen


class Refuses(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} reached the caller's mode")


class RefusesFunctions(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} reached the caller's mode")


def state():
    return (
        torch.get_rng_state().tolist(),
        random.getstate(),
        torch.get_default_dtype(),
        torch.get_default_device(),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )


def test_the_callers_state_neither_matters_nor_changes():
    one, other = problem(), problem(dtype=torch.bfloat16)
    torch.set_default_dtype(torch.float64)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with torch.device("meta"), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            before = state()
            (first,) = measuring.measure([one])
            assert state() == before
        with Refuses(), RefusesFunctions():
            (second,) = measuring.measure([other])
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_default_dtype(torch.float32)
    for each in (first, second):
        assert isinstance(each, Timing), each
        assert all(0 < seconds < 10 for seconds in each)


@pytest.mark.parametrize("size", [(4096, 4096), (64, 64), (768, 3072), (14336, 4096)])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("spec", ["64:2:8", "64:2:16", "16:2:4"])
def test_as_many_bytes_of_both_weights(monkeypatch, size, device, spec):
    monkeypatch.setattr(measuring, "_MOST_COPIES", {"cpu": 2048, "cuda": 256})
    sparse, dense = Layout(Spec.parse(spec), *size).nbytes(torch.bfloat16), size[0] * size[1] * 2
    sparse_copies, dense_copies = measuring.copies(sparse, dense, device)
    assert max(sparse_copies, dense_copies) <= measuring._MOST_COPIES[device]
    assert abs(sparse_copies * sparse - dense_copies * dense) < max(sparse, dense)
    if size != (64, 64):
        assert min(sparse_copies * sparse, dense_copies * dense) >= 90 << 20


def test_token_counts_are_rounded_to_powers_of_two(timed):
    for tokens in (1, 2, 3, 4, 5, 60, 64, 70, 90, 91, 128, 0):
        measuring.measure([problem(tokens)])
    assert [each.tokens for each in timed] == [1, 2, 4, 64, 128]


def test_explain_says_what_was_measured(timed):
    layer = make_sparse_(nn.Linear(64, 32), "16:2:8").eval()
    (seen,) = vnm.explain(layer, torch.randn(100, 64)).layers
    assert "at T = 128" in seen.reason
    assert len(timed) == 1


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("no room\nat all"), RuntimeError("g++: not found"), OSError()]
)
def test_what_cannot_be_measured_stays_dense_for_that_reason(monkeypatch, error):
    calls = []

    def fail(each):
        calls.append(each)
        raise error

    monkeypatch.setattr(measuring, "_time", fail)
    layer = make_sparse_(nn.Linear(64, 32), "16:2:8").eval()
    (seen,) = vnm.explain(layer, torch.randn(3, 64)).layers
    assert seen.decision == "dense"
    assert "measuring it failed" in seen.reason
    assert type(error).__name__ in seen.reason
    assert "\n" not in seen.reason
    assert isinstance(measuring.measure([problem(3)])[0], Failure)
    assert len(calls) == 1, "it is not tried again"
    assert timings.load(problem(3)) is None, "nor kept"


def test_kernels_of_several_problems_are_compiled_once_and_side_by_side(monkeypatch):
    built: list[str] = []
    compile_cpp = CppBuilder.build
    monkeypatch.setattr(
        CppBuilder, "build", lambda self: built.append(self.get_target_file_path()) or compile_cpp(self)
    )
    graphs: list[int] = []
    compile_graph = measuring._compile
    monkeypatch.setattr(
        measuring, "_compile", lambda gm, inputs: graphs.append(len(inputs)) or compile_graph(gm, inputs)
    )
    asked = [problem(2, 48), problem(2, 80), problem(2, 48), problem(2, 80, dtype=torch.bfloat16)]
    with fresh_cache():
        answers = measuring.measure(asked)
    assert all(isinstance(each, Timing) for each in answers)
    assert answers[0] == answers[2]
    assert graphs[0] == 3 * 5, "three problems in one graph, each with x, bias and three arrays"
    assert len(graphs) == 1 + 2 * 3
    kernels = [each for each in built if each.endswith(".main.so")]
    assert len(kernels) == len(set(kernels)) == 3, "what was compiled side by side is what is timed"


def test_one_problem_that_cannot_be_compiled_does_not_keep_others_from_being_measured(monkeypatch):
    compile_graph = measuring._compile

    def fail(gm, inputs):
        if any(each.dtype == torch.bfloat16 for each in inputs):
            raise RuntimeError("g++: internal compiler error")
        return compile_graph(gm, inputs)

    monkeypatch.setattr(measuring, "_compile", fail)
    fails, works = measuring.measure([problem(dtype=torch.bfloat16), problem()])
    assert isinstance(fails, Failure)
    assert isinstance(works, Timing)


def test_rounds_go_through_all_copies_in_turn():
    made: list[int] = []
    run = measuring._round([partial(made.append, i) for i in range(5)], torch.device("cpu"))
    for _ in range(3):
        assert run() > 0
    assert made == [i % 5 for i in range(len(made))]
    assert len(made) == 2 + 3 * 5, "each fits, so a round is all of them"


def test_kept_for_the_next_process(timed, monkeypatch):
    measuring.measure([problem()])
    monkeypatch.setattr(measuring, "_known", {})
    assert measuring.measure([problem()]) == [Timing(1e-6, 2e-6)]
    assert len(timed) == 1


def test_another_processor_or_number_of_threads_is_another_problem(timed, monkeypatch):
    measuring.measure([problem()])
    monkeypatch.setattr(timings, "_cpu", lambda: "another model")
    measuring.measure([problem()])
    assert len(timed) == 2
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        measuring.measure([problem()])
    finally:
        torch.set_num_threads(threads)
    assert len(timed) == 3


CONTENTS = [
    b"",
    b"{",
    b'{"sparse": 1e-6',
    b"[1, 2]",
    b"null",
    b'{"sparse": 1e-6}',
    b'{"sparse": "fast", "dense": "slow"}',
    b'{"sparse": NaN, "dense": 1.0}',
    b'{"sparse": -1.0, "dense": 1.0}',
    b'{"sparse": 0.0, "dense": 1.0}',
    b'{"sparse": 1e-6, "dense": 1e999}',
    b'{"sparse": true, "dense": 1.0}',
    b'{"sparse": 1e-6, "dense": 2e-6, "more": 1}',
    b"\xff\xfe\x00",
    b"[" * 4000,
]


@pytest.mark.parametrize("content", CONTENTS, ids=range(len(CONTENTS)))
def test_files_that_are_cut_or_foreign_are_measured_again(timed, content):
    path = timings._path(problem())
    path.parent.mkdir()
    path.write_bytes(content)
    assert measuring.measure([problem()]) == [Timing(1e-6, 2e-6)]
    assert len(timed) == 1
    assert json.loads(path.read_text()) == {"sparse": 1e-6, "dense": 2e-6}


def test_a_directory_that_cannot_be_written(timed, monkeypatch, tmp_path, caplog):
    (tmp_path / "vnm").write_text("in the way")
    assert measuring.measure([problem(1)]) == [Timing(1e-6, 2e-6)]
    assert "could not be kept" in caplog.text
    (tmp_path / "vnm").unlink()

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    assert measuring.measure([problem(2)]) == [Timing(1e-6, 2e-6)]
    assert not list((tmp_path / "vnm").iterdir()), "nothing is left behind"

    def forbidden():
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(timings, "cache_dir", forbidden)
    assert measuring.measure([problem(4)]) == [Timing(1e-6, 2e-6)]


def test_readers_see_whole_files(tmp_path):
    seen: list[Timing | None] = []

    def work(i: int) -> None:
        for _ in range(40):
            timings.store(problem(), Timing(1e-6 * i, 2e-6))
            seen.append(timings.load(problem()))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(1, 5)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert len(seen) == 160
    assert None not in seen
    assert [path.suffix for path in Path(tmp_path / "vnm").iterdir()] == [".json"]
