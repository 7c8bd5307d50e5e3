"""The benchmarks of distillation, on a tiny model and text that comes with Python."""

from __future__ import annotations

from pydoc_data.topics import topics

import pytest
import torch
from transformers import BertConfig, BertModel

from benchmarks import distill, distill_recipes, minilm, minilm_texts
from tests.support import with_slow


@pytest.fixture
def tiny(monkeypatch):
    sentences = [each.strip() for text in topics.values() for each in text.split(". ") if len(each) > 40]
    monkeypatch.setattr(minilm_texts, "glosses", lambda: sentences)
    monkeypatch.setattr(minilm_texts, "docstrings", lambda: [each for each in sentences if len(each) > 150][:200])
    for name, value in {"HELD_OUT": 24, "CALIBRATION": 32, "TOKENS": 192}.items():
        monkeypatch.setattr(minilm_texts, name, value)
    _, tokenizer = minilm.load()
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "initializer_range": 0.2,
    }
    model = BertModel(BertConfig(vocab_size=tokenizer.vocab_size, **sizes), add_pooling_layer=False).eval()
    return model, minilm_texts.texts(tokenizer)


@pytest.fixture
def uncompiled(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda model, **_: model)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda *_, **__: None)


def run_tiny(dense, data, tmp_path, steps):
    judge, seen = minilm.Judge(dense, data), []
    before = distill.prune(dense, data, judge, "16:2:8")
    weights = [each.clone() for each in before[0].parameters()]
    after = distill.run(before, dense, data, judge, 0, steps, seen.append, rate=5e-3)
    again = distill.run(before, dense, data, judge, 1, 4)  # from the same start
    assert all(torch.equal(one, other) for one, other in zip(weights, before[0].parameters(), strict=True))
    rows = [before[1], after, again]
    assert [each.steps for each in rows] == [0, steps, 4]
    assert len(seen) == steps
    assert sum(seen[-4:]) < sum(seen[:4])  # each kind of text once
    assert all(-1 <= each <= 1 for row in rows for each in row.figures)
    assert len(distill.table(rows).splitlines()) == 5
    saved = [distill.Row(**distill.kept(each)) for each in rows]
    assert [distill.kept(each) for each in saved] == [distill.kept(each) for each in rows]
    distill.plot([*rows, *saved], tmp_path / "loss.png")
    assert (tmp_path / "loss.png").stat().st_size > 5_000


def test_a_run(tiny, uncompiled, tmp_path):
    run_tiny(*tiny, tmp_path, 30)


@pytest.mark.slow
def test_a_compiled_run(tiny, tmp_path):
    run_tiny(*tiny, tmp_path, 24)


def test_seeds_are_put_together():
    rows = [distill.Row("64:2:8", seed, 10, 60.0, 0.5 + 0.1 * seed, 0.5, 0.5, 0.5, []) for seed in range(3)]
    assert distill.table(rows).splitlines()[2].startswith("| 64:2:8 | distilled, 10 steps | 3 | 1.0 | 0.600 ± 0.100 |")


@pytest.mark.parametrize(
    "name", with_slow(list(distill_recipes.WAYS), quick=["one shot, magnitude", "structure decay, geometric"])
)
def test_a_recipe(tiny, uncompiled, tmp_path, monkeypatch, name):
    monkeypatch.setattr(distill_recipes, "SPEC", "16:2:8")
    judge = minilm.Judge(*tiny)
    run = distill_recipes.run(name, *tiny, judge, 30)
    assert run.steps == (0 if name.startswith("one shot") else 30)
    assert -1 <= run.cosine <= 1
    assert len(distill_recipes.table([run]).splitlines()) == 3
    distill_recipes.plot([run], tmp_path / "loss.png")
    assert (tmp_path / "loss.png").stat().st_size > 5_000


def test_texts_are_apart_and_batches_repeat(tiny):
    _, data = tiny
    one, two = (minilm_texts.batch_of(data, 4, 1) for _ in range(2))
    assert torch.equal(one["input_ids"], two["input_ids"])
    shapes = {tuple(minilm_texts.batch_of(data, step, 1)["input_ids"].shape) for step in range(8)}
    assert shapes == {(2, 96), (8, 24)}
    held = {tuple(row.tolist()) for batch in data.general for row in batch["input_ids"]}
    assert len(held) > 20


@pytest.mark.slow
def test_documentation_to_judge_by_is_not_trained_on():
    held, training = minilm_texts.documentation()
    assert len(held) == 256
    assert len(training) > 1000
    assert not set(held) & set(training)


def test_agreement_of_a_model_with_itself():
    x = torch.nn.functional.normalize(torch.randn(12, 8), dim=-1)
    assert minilm.agreement(x, x) == pytest.approx((1, 1))
    cosine, pairs = minilm.agreement(torch.nn.functional.normalize(torch.randn(12, 8), dim=-1), x)
    assert abs(cosine) < 0.9
    assert abs(pairs) < 0.9


def test_without_wordnet(monkeypatch, tmp_path):
    monkeypatch.setattr(minilm_texts, "WORDNET", tmp_path)
    with pytest.raises(SystemExit, match="wordnet-base"):
        minilm_texts.glosses()
