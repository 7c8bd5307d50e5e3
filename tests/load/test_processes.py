"""A short run of what `python -m tests.load` measures at length."""

from __future__ import annotations

import pytest

from tests.load import processes


@pytest.mark.slow  # tests/test_caches.py has the like
def test_a_second_process_starts_warm():
    compiled, equal, added = processes.warm_start()
    assert (compiled, equal, added) == (0, True, 0)


@pytest.mark.slow
@pytest.mark.parametrize("how", [processes.forked, processes.spawned])
def test_children(how):
    assert how()


@pytest.mark.slow
def test_cut_files_of_ours_are_no_harm():
    assert processes.cut_files() == 0


@pytest.mark.slow
def test_rounds_of_compile_and_reset_leave_nothing():
    _, kept = processes.rounds(6)
    assert kept == 0


@pytest.mark.slow
def test_processes_that_share_a_cache():
    assert processes.one_cache(4) == (4, 0)


@pytest.mark.slow
def test_a_killed_writer():
    assert processes.killed(3) == 0
