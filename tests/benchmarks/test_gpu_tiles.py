"""The benchmark of tiles, as far as it runs without a GPU: every template becomes a kernel of its own, and compiles."""

from __future__ import annotations

import pytest

from benchmarks import gpu_tiles
from benchmarks.gpu_tiles import Job
from vnm_compile.codegen.triton.configs import Config

JOBS = [
    Job("64:2:8", 256, 1024, 16, Config(64, 16, 32, 4, 5, 2)),
    Job("128:2:16", 256, 2048, 100, Config(128, 64, 32, 4, 3)),
    Job("64:2:8", 100, 1024, 1, Config(16, 1, 128, 2, 1)),
]


@pytest.mark.parametrize("job", JOBS, ids=str)
def test_a_template_alone_compiles(job):
    assert gpu_tiles.problem(job) is None


def test_what_does_not_compile_is_said():
    wrong = Job("64:2:8", 256, 1024, 16, Config(48, 16, 32, 4, 5))  # no power of two
    assert gpu_tiles.problem(wrong).startswith("CompilationError")


def test_what_is_promising():
    found = list(gpu_tiles.jobs(("64:2:8",)))
    assert len(found) == len(set(found))
    assert any(job.is_vector for job in found)
    assert {job.config.splits for job in found} > {1, 4}
    assert {job.tokens for job in found} == set(gpu_tiles.TOKENS)


def test_dry_run_and_no_gpu(capsys, monkeypatch):
    assert gpu_tiles.main([]) == 2
    monkeypatch.setattr(gpu_tiles, "jobs", lambda specs: JOBS[:1])
    monkeypatch.setattr(gpu_tiles, "compile_all", lambda found: found)
    assert gpu_tiles.main(["--dry-run"]) == 0
    assert "1 of 1 kernels compile" in capsys.readouterr().out
