"""The training benchmark, in a few steps: every recipe runs, learns, and ends in the pattern."""

from __future__ import annotations

import pytest

import vnm_compile as vnm
from benchmarks import training
from benchmarks.training_tasks import TASKS


@pytest.mark.slow
@pytest.mark.parametrize("task", list(TASKS))
def test_every_recipe(task, tmp_path, monkeypatch):
    judged = []
    kind = TASKS[task]
    judge = kind.judge
    monkeypatch.setattr(kind, "judge", lambda self, model: judged.append(model) or judge(self, model))
    monkeypatch.setattr(training, "RATE", 3e-3)
    runs = {name: [training.run(name, kind, seed=0, steps=12)] for name in training.RECIPES}
    for (name, (made,)), model in zip(runs.items(), judged, strict=True):
        assert sum(made.curve[-3:]) < sum(made.curve[:3]), name
        assert 0 <= made.accuracy <= 1
        assert vnm.matches(model.blocks[0].up.weight, training.SPEC) == (name != "dense"), name
    assert len(training.table(runs).splitlines()) == 2 + len(runs)
    training.plot(
        {name: [vars_of(made) for made in each] for name, each in runs.items()}, "A title", tmp_path / "a.png"
    )
    assert (tmp_path / "a.png").stat().st_size > 5_000


def vars_of(made):
    """A run with as many losses as a plot has at least."""
    return training.Run(made.accuracy, made.loss, made.curve * 5, made.mask_share)


@pytest.mark.parametrize("task", list(TASKS))
def test_what_is_held_out_is_not_trained_on(task):
    work = TASKS[task](0)
    if task == "digits":
        kept, held = work.images.flatten(1), work.held.flatten(1)
    else:
        size = work.held.shape[1]
        kept, held = work.pieces.unfold(1, size, 1).flatten(0, 1), work.held
    seen = {tuple(row) for row in kept.tolist()}
    assert sum(tuple(row) in seen for row in held.tolist()) <= 0.02 * len(held)
    assert work.loss(work.model()).isfinite()
