"""The GPU benchmark, as far as it runs without a GPU: arguments, statistics, tables, the plot, and the dry run."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from benchmarks import gpu, gpu_cases, gpu_check, gpu_contenders, gpu_estimate, gpu_models, gpu_timing
from benchmarks.blocks import EncoderBlock, LlamaBlock
from benchmarks.gpu_cases import LARGE, TARGETS, TOKENS, Case
from benchmarks.report import ROOT
from vnm_compile.hardware import TARGETS as TARGET_CARDS
from vnm_compile.quantization import Quantization
from vnm_compile.spec import Spec


def row(case="14336 x 4096", spec="64:2:8", tokens=1, dense=30.0, sparse=10.0, semi_structured=20.0):
    return gpu.Row(case, spec, tokens, dense, "cuBLAS", semi_structured, sparse, floor_us=8.0, limit=3.5)


def large(spec, tokens, ratios):
    names = [f"{o} x {k}" for o, k in LARGE]
    return [row(name, spec, tokens, 10.0 * ratio) for name, ratio in zip(names, ratios, strict=True)]


def test_means_take_the_better_v_and_both_shapes():
    rows = [*large("64:2:8", 1, (2.0, 4.5)), *large("128:2:8", 1, (2.0, 2.0)), *large("64:2:16", 16, (4.0, 4.0))[:1]]
    ((m, tokens, mean, target, over),) = gpu.geometric_means(rows)
    assert (m, tokens, target) == (8, 1, TARGETS[8][0])
    assert mean == pytest.approx(3.0)
    assert over == pytest.approx(2.0)


def test_one_v_is_taken_for_all_tokens():
    rows = [*large("64:2:8", 1, (3.0, 3.0)), *large("64:2:8", 2048, (1.0, 1.0))]
    rows += [*large("128:2:8", 1, (2.5, 2.5)), *large("128:2:8", 2048, (2.0, 2.0))]
    assert [(tokens, mean) for _, tokens, mean, _, _ in gpu.geometric_means(rows)] == [
        (1, pytest.approx(2.5)),
        (2048, pytest.approx(2.0)),
    ]


def test_a_result_is_as_good_as_rounding_allows():
    layer = torch.nn.Linear(512, 64, bias=False)
    x = torch.randn(5, 512)
    *_, fine = gpu_check.errors(layer, layer(x), x)
    *_, off = gpu_check.errors(layer, layer(x) + 1e-4, x)
    assert fine
    assert not off


def test_what_fails_is_left_out(monkeypatch, capsys):
    def capture(calls):
        for call in calls:
            call()
        return 1.0

    monkeypatch.setattr(gpu_timing, "_capture", capture)
    monkeypatch.setattr(gpu_timing, "_replay", lambda graph: graph)
    taken = gpu_timing.seconds_of_each({"right": [lambda: None], "wrong": [lambda: 1 / 0]})
    assert set(taken) == {"right"}
    assert "wrong was not timed: ZeroDivisionError" in capsys.readouterr().out


def test_the_summary_says_what_is_missed():
    rows = [*large("64:2:8", 1, (3.0, 3.0)), *large("64:2:8", 2048, (1.1, 1.1)), row("1024 x 4096", dense=12.0)]
    lines = [line.split() for line in gpu.summary(rows).splitlines()[1:]]
    assert [line[4] for line in lines] == ["yes", "NO", "NO"]
    assert lines[-1][:3] == ["small", "1", "1.20"]


def test_table_and_plot(tmp_path):
    rows = [row(tokens=tokens, semi_structured=None if tokens > 1 else 15.0) for tokens in TOKENS]
    text = gpu.table(gpu.HEADINGS, (each.cells for each in rows))
    assert len(text.splitlines()) == 1 + len(rows)
    assert "3.00" in text
    assert "80%" in text
    gpu.plot(rows, tmp_path / "gpu.png")
    assert (tmp_path / "gpu.png").stat().st_size > 10_000


def test_floors():
    case = Case(14336, 4096, 1, Spec.parse("64:2:8"))
    # One token: bytes; the byte ratio of the format, activations aside.
    dense, sparse = (case.floor(4.8e12, 989e12, kind) for kind in (False, True))
    activations = 2 * (14336 + 4096)
    stored = case.layout.nbytes(torch.bfloat16)
    assert dense / sparse == pytest.approx((2 * 14336 * 4096 + activations) / (stored + activations))
    assert 3.4 < dense / sparse < 3.6
    # Many: flops on the kept columns, M/4 fewer.
    case = Case(14336, 4096, 8192, Spec.parse("64:2:8"))
    assert case.floor(4.8e12, 989e12, False) / case.floor(4.8e12, 989e12, True) == pytest.approx(2.0)


def test_the_cases_cover_the_targets():
    cases = [case for cases in gpu_cases.layers() for case in cases]
    for m in TARGETS:
        for tokens in TOKENS:
            found = {case.name for case in cases if case.spec.m == m and case.tokens == tokens}
            assert len(found) == len(LARGE)
    assert {case.dtype for case in gpu_cases.correctness()} == {torch.bfloat16, torch.float16, torch.float32}


@pytest.mark.slow
@pytest.mark.parametrize("way", gpu_models.WAYS)
def test_blocks_are_right_in_every_way(way):
    small = [
        gpu_models.Block(
            "encoder", "16:2:8", (5,), partial(EncoderBlock, 64, 128, 2), partial(gpu_models._sequence, 64, 2)
        ),
        gpu_models.Block(
            "decoder", "16:2:8", (5,), partial(LlamaBlock, 256, 384, 2), partial(gpu_models._rotated, 256)
        ),
    ]
    for block in small:
        model = gpu_models.build(block, torch.float32, torch.device("cpu"))
        ours, dense = gpu_models.errors(block, model, 5, way)
        assert ours <= 1.5 * dense


def test_unknown_section_and_no_gpu(capsys):
    with pytest.raises(SystemExit):
        gpu.main(["--sections", "everything"])
    assert gpu.main(["--sections", "layers"]) == 2
    assert "--dry-run" in capsys.readouterr().out


def test_dry_run(capsys, monkeypatch):
    monkeypatch.setattr(gpu_cases, "layers", lambda: [[Case(14336, 4096, 16, Spec.parse("64:2:8"))]])
    monkeypatch.setattr(gpu_cases, "small", lambda: [[Case(1024, 4096, 2048, Spec.parse("128:2:32"))]])
    quantised = Case(4096, 4096, 16, Spec.parse("64:2:8"), quantization=Quantization(4, 64))
    monkeypatch.setattr(gpu_cases, "values", lambda: [[quantised]])
    assert gpu.main(["--dry-run", "--target", "sm_80"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert "64:2:8 int4/64" in lines[-1]
    assert all(line.split()[-3] == "0" for line in lines[1:])  # spills


def test_estimates():
    found = list(gpu_estimate.estimates([TARGET_CARDS["sm_80"]]))
    assert {(each.spec, each.tokens) for each in found} == {(spec, t) for spec in gpu_cases.SPECS for t in TOKENS}
    assert all(each.ratio > 0.3 for each in found)
    table = gpu_estimate.table(found)
    assert len(table.splitlines()) == 2 + len(TARGETS) + len(TARGETS)
    assert "| A100-SXM4-80GB | 8 |" in table


def test_estimates_are_near_what_was_timed_on_an_h200():
    pairs = gpu_estimate.held_against_h200()
    assert len(pairs) > 15
    for case, (measured, estimated) in pairs.items():
        assert 0.7 < estimated / measured < 1.35, case


def test_the_estimates_of_the_docs_are_those_of_the_model():
    """docs/performance.md has what `python -m benchmarks.gpu --estimate --write` writes."""
    assert gpu_estimate.run(write=False) in (ROOT / "docs" / "performance.md").read_text()


@pytest.mark.parametrize("kind", [None, Quantization(8, 64)], ids=str)
def test_errors_are_against_what_the_weight_is(kind):
    """The layers that are timed, on this machine's CPU: right ones are, and those of another weight are not."""
    case = Case(128, 512, 5, Spec.parse("64:2:8"), torch.float32, kind)
    one, other = gpu_contenders.linears(case, torch.device("cpu"), 2)
    x = torch.randn(5, 512)
    with torch.no_grad():
        assert gpu_check.errors(one, one(x), x)[-1]
        assert not gpu_check.errors(one, other(x), x)[-1]


def test_quantised_cases_are_timed_beside_others():
    cases = [case for cases in gpu_cases.values() for case in cases]
    assert {case.stored for case in cases} >= {"64:2:8", "64:2:8 int4/64", "128:2:16 int8/64"}
    assert [case for case in gpu_cases.correctness() if case.quantization]
