"""The distillation benchmark, on a tiny model and text that comes with Python."""

from __future__ import annotations

from pydoc_data.topics import topics

import pytest
import torch
from transformers import BertConfig, BertModel

from benchmarks import distill


@pytest.fixture
def tiny(monkeypatch):
    sentences = [each.strip() for text in topics.values() for each in text.split(". ") if len(each) > 40]
    monkeypatch.setattr(distill, "glosses", lambda: sentences)
    monkeypatch.setattr(distill, "docstrings", lambda: [each for each in sentences if len(each) > 150][:200])
    for name, value in {"HELD_OUT": 24, "CALIBRATION": 32, "TOKENS": 192, "RATE": 5e-3}.items():
        monkeypatch.setattr(distill, name, value)
    _, tokenizer = distill.load()
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "initializer_range": 0.2,
    }
    model = BertModel(BertConfig(vocab_size=tokenizer.vocab_size, **sizes), add_pooling_layer=False).eval()
    return model, distill.texts(tokenizer)


def test_a_run(tiny, tmp_path):
    seen = []
    before, after = distill.run(*tiny, "16:2:8", seed=0, steps=30, moved=seen.append)
    assert (before.steps, after.steps, len(seen)) == (0, 30, 30)
    assert sum(seen[-4:]) < sum(seen[:4])  # each kind of text once
    assert all(-1 <= each <= 1 for each in (before.cosine, before.pairs, after.docs_cosine, after.docs_pairs))
    lines = distill.table([before, after]).splitlines()
    assert len(lines) == 4
    distill.plot([before, after], tmp_path / "loss.png")
    assert (tmp_path / "loss.png").stat().st_size > 5_000


def test_texts_are_apart_and_batches_repeat(tiny):
    _, data = tiny
    one, two = (distill.batch_of(data, 4, 1) for _ in range(2))
    assert torch.equal(one["input_ids"], two["input_ids"])
    assert one["input_ids"].numel() <= 192
    assert distill.batch_of(data, 5, 1)["input_ids"].numel() <= 192  # documentation
    held = {tuple(row.tolist()) for batch in data.general for row in batch["input_ids"]}
    assert len(held) > 20


@pytest.mark.slow
def test_documentation_to_judge_by_is_not_trained_on():
    held, training = distill.documentation()
    assert len(held) == 256
    assert len(training) > 1000
    assert not set(held) & set(training)


def test_agreement_of_a_model_with_itself():
    x = torch.nn.functional.normalize(torch.randn(12, 8), dim=-1)
    assert distill.agreement(x, x) == pytest.approx((1, 1))
    cosine, pairs = distill.agreement(torch.nn.functional.normalize(torch.randn(12, 8), dim=-1), x)
    assert abs(cosine) < 0.9
    assert abs(pairs) < 0.9


def test_without_wordnet(monkeypatch, tmp_path):
    monkeypatch.setattr(distill, "WORDNET", tmp_path)
    with pytest.raises(SystemExit, match="wordnet-base"):
        distill.glosses()
