"""The recipes in a transformers.Trainer: steps counted right, checkpoints, an exact model at the end."""

from __future__ import annotations

import pytest
import torch
import transformers as hf

import vnm_compile as vnm
from vnm_compile import train
from vnm_compile.errors import BadOption

pytest.importorskip("accelerate")

SPEC = "16:2:8"
TINY = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}


class Data(torch.utils.data.Dataset):
    def __len__(self):
        return 32

    def __getitem__(self, i):
        ids = torch.arange(i, i + 6) % 64
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor(i % 2)}


def trainer(folder, recipe, finalize=True, **options):
    torch.manual_seed(0)
    model = hf.BertForSequenceClassification(hf.BertConfig(**TINY))
    arguments = hf.TrainingArguments(
        str(folder), max_steps=6, per_device_train_batch_size=4, gradient_accumulation_steps=2, save_steps=3,
        report_to=[], use_cpu=True, learning_rate=1e-3, logging_steps=1000, disable_tqdm=True, **options,
    )  # fmt: skip
    callback = train.MaskCallback(SPEC, recipe, finalize=finalize)
    return hf.Trainer(model, arguments, train_dataset=Data(), callbacks=[callback]), callback


def test_a_run_and_one_that_goes_on_from_its_middle(tmp_path):
    recipe = train.MaskDecay(every=2)
    whole, callback = trainer(tmp_path, recipe)
    whole.train()
    assert (callback.training.step_number, callback.training.steps) == (6, 6)
    layer = whole.model.bert.encoder.layer[0].intermediate.dense
    assert vnm.matches(layer.weight, SPEC)
    assert not any("parametrizations" in name for name in whole.model.state_dict())
    again, callback = trainer(tmp_path, recipe)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert callback.training.step_number == 6
    for one, other in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_going_on_with_another_recipe_is_refused(tmp_path):
    first, _ = trainer(tmp_path, train.MaskDecay(every=2))
    first.train()
    second, _ = trainer(tmp_path, train.SRSTE())
    with pytest.raises(BadOption, match="another recipe"):
        second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_masks_may_stay_on(tmp_path):
    kept, callback = trainer(tmp_path, train.StructureDecay(), finalize=False)
    kept.train()
    assert any("parametrizations" in name for name in kept.model.state_dict())
    assert callback.training.finalize()
