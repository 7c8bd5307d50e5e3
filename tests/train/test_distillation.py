"""Distillation: every term against its formula, the teacher untouched, padding without a say, clear errors."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import transformers as hf
from torch import nn
from torch.nn import functional as F

import vnm_compile as vnm
from tests.train.test_trainer import TINY, Data
from vnm_compile.errors import BadLoss, BadModel, BadOption
from vnm_compile.train import Distillation, Terms

ONLY = {"hidden": 0, "embeddings": 0}


def pair(module=hf.BertModel, **options):
    """A teacher, and a student that is another."""
    torch.manual_seed(0)
    teacher = module(hf.BertConfig(**{**TINY, "num_hidden_layers": 2}, **options))
    student = copy.deepcopy(teacher)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    return teacher, student


def batch():
    ids = torch.randint(64, (3, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, 4:] = mask[2, 2:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def test_hidden_states_and_embeddings_by_their_formulas():
    teacher, student = pair()
    inputs = batch()
    found = Distillation(teacher, Terms(hidden=2, embeddings=3))(student.eval(), **inputs)
    ours, theirs = (
        model.eval().double()(**inputs, output_hidden_states=True).hidden_states for model in (student, teacher)
    )
    inside = inputs["attention_mask"].bool()
    hidden = sum(
        (a[inside] - b[inside]).pow(2).mean() / b[inside].pow(2).mean() for a, b in zip(ours, theirs, strict=True)
    )
    pooled = [torch.stack([state[-1][i][inside[i]].mean(0) for i in range(3)]) for state in (ours, theirs)]
    cosine = (1 - F.cosine_similarity(*pooled)).mean()
    torch.testing.assert_close(found.terms["hidden"].double(), (hidden / 3).detach(), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(found.terms["embeddings"].double(), cosine.detach(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.loss, 2 * found.terms["hidden"] + 3 * found.terms["embeddings"])
    assert found.outputs.last_hidden_state.shape == (3, 7, 32)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("module", [hf.BertForMaskedLM, hf.BertForSequenceClassification])
def test_logits_by_their_formula(module, temperature):
    teacher, student = pair(module)
    inputs = batch()
    found = Distillation(teacher, Terms(**ONLY, logits=1, temperature=temperature))(student.eval(), **inputs)
    ours, theirs = (model.eval().double()(**inputs).logits / temperature for model in (student, teacher))
    if ours.dim() == 3:
        ours, theirs = (each[inputs["attention_mask"].bool()] for each in (ours, theirs))
    expected = (theirs.softmax(-1) * (theirs.log_softmax(-1) - ours.log_softmax(-1))).sum(-1).mean()
    torch.testing.assert_close(found.loss.double(), (temperature**2 * expected).detach(), rtol=5e-3, atol=1e-7)


def test_padding_has_no_say():
    teacher, student = pair(hf.BertForMaskedLM)
    distillation = Distillation(teacher, Terms(logits=1))
    inputs = batch()
    other = {**inputs, "input_ids": torch.where(inputs["attention_mask"].bool(), inputs["input_ids"], 5)}
    one, two = (distillation(student.eval(), **each) for each in (inputs, other))
    torch.testing.assert_close(one.loss, two.loss)
    short = {name: each[2:, :2] for name, each in inputs.items()}
    alone, padded = distillation(student, **short), distillation(student, **{k: v[2:] for k, v in inputs.items()})
    torch.testing.assert_close(alone.loss, padded.loss)


def test_masks_of_every_form_say_the_same():
    """Ones, booleans, what is added to the scores, and a mask for each query."""
    teacher, student = pair(hf.BertForMaskedLM)
    distillation = Distillation(teacher, Terms(logits=1))
    inputs = batch()
    ones = inputs["attention_mask"]
    expected = distillation(student.eval(), **inputs)
    added = torch.zeros(3, 1, 7, 7).masked_fill(ones[:, None, None] == 0, torch.finfo(torch.float32).min)
    for mask in (ones.bool(), added):
        found = distillation(student, **{**inputs, "attention_mask": mask})
        torch.testing.assert_close(found.loss, expected.loss, rtol=1e-4, atol=1e-6)


def test_only_the_student_learns():
    teacher, student = pair(hidden_dropout_prob=0.5)
    before = copy.deepcopy(teacher.state_dict())
    found = Distillation(teacher.train())(student.train(), **batch())
    found.loss.backward()
    assert not teacher.training
    assert all(parameter.grad is None for parameter in teacher.parameters())
    used = [p for name, p in student.named_parameters() if "pooler" not in name]
    assert all(parameter.grad is not None for parameter in used)
    assert all(torch.equal(before[name], each) for name, each in teacher.state_dict().items())
    assert not any(term.requires_grad for term in found.terms.values())
    student.eval()
    assert Distillation(teacher)(copy.deepcopy(teacher).train(False), **batch()).loss < 1e-6


def test_the_students_own_loss_joins():
    teacher, student = pair(hf.BertForSequenceClassification)
    inputs = {**batch(), "labels": torch.tensor([0, 1, 1])}
    found = Distillation(teacher, Terms(**ONLY, logits=1, task=0.5))(student.eval(), **inputs)
    torch.testing.assert_close(found.terms["task"], student(**inputs).loss.detach())
    torch.testing.assert_close(found.loss, found.terms["logits"] + 0.5 * found.terms["task"])


class Net(nn.Module):
    def __init__(self, depth=2):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(depth))
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def test_any_module_by_name():
    torch.manual_seed(0)
    teacher, student = Net(4), Net(2)
    x = torch.randn(6, 16)
    layers = {"blocks.0": "blocks.1", "blocks.1": "blocks.3"}
    found = Distillation(teacher, Terms(hidden=1, embeddings=0, logits=1), layers=layers)(student, x)
    states = x, x
    expected = 0.0
    for i in range(2):
        ours = student.blocks[i](states[0])
        theirs = teacher.blocks[2 * i + 1](teacher.blocks[2 * i](states[1]))
        expected = expected + (ours - theirs).square().mean() / theirs.square().mean() / 2
        states = ours, theirs
    torch.testing.assert_close(found.terms["hidden"], expected.detach())
    assert not any(module._forward_hooks for module in (*teacher.modules(), *student.modules()))
    found.loss.backward()
    assert student.blocks[0][0].weight.grad is not None


class Writes(Net):
    """Writes to what it is called with, to what a block returned, and calls its first block twice."""

    def __init__(self):
        super().__init__()
        self.blocks[1] = nn.Linear(16, 16)

    def forward(self, x):
        x.mul_(0.5)
        x = self.blocks[0](self.blocks[0](x))
        y = self.blocks[1](x)
        y.add_(x)
        return self.head(y)


def test_models_that_write_to_their_tensors():
    torch.manual_seed(0)
    teacher, student = Writes(), Writes()
    x = torch.randn(6, 16)
    terms = Terms(hidden=1, embeddings=0)
    found = Distillation(teacher, terms, layers=["blocks.0", "blocks.1"])(student, x.clone())
    states = []
    for model in (student, teacher):
        first = model.blocks[0](0.5 * x)
        second = model.blocks[0](first)
        states.append([first, second, model.blocks[1](second)])
    expected = sum((a - b).square().mean() / b.square().mean() for a, b in zip(*states, strict=True)) / 3
    torch.testing.assert_close(found.loss, expected)
    found.loss.backward()


def test_layers_of_a_model_that_is_compiled_in_parts():
    torch.manual_seed(0)
    teacher, student = Net(), Net()
    layers = ["blocks.0.0", "blocks.1"]
    x = torch.randn(6, 16)
    expected = Distillation(teacher, Terms(embeddings=0), layers=layers)(student, x).loss
    student.blocks[0] = torch.compile(student.blocks[0], backend="eager")
    torch.testing.assert_close(Distillation(teacher, Terms(embeddings=0), layers=layers)(student, x).loss, expected)


def test_a_pruned_model_comes_nearer_to_its_teacher():
    torch.manual_seed(0)
    teacher = Net()
    student = copy.deepcopy(teacher)
    vnm.sparsify(student, "16:2:8", include="blocks", progress=False)
    distillation = Distillation(teacher, Terms(hidden=1, embeddings=0, logits=1), layers=["blocks.0", "blocks.1"])
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)
    training = vnm.train.begin(student, None, vnm.train.FixedMask(), 60, optimizer=optimizer, include="blocks")
    losses = []
    for _ in range(60):
        found = distillation(student, torch.randn(64, 16))
        optimizer.zero_grad()
        found.loss.backward()
        optimizer.step()
        losses.append(found.loss.item())
    training.finalize()
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    assert all(vnm.matches(block[0].weight, "16:2:8") for block in student.blocks)


def test_on_compressed_weights_compiled():
    torch.manual_seed(0)
    teacher = Net()
    student = copy.deepcopy(teacher)
    vnm.sparsify(student, "16:2:8", include="blocks", progress=False)
    vnm.train.compress_for_training(student)
    distillation = Distillation(teacher, Terms(hidden=0, embeddings=0, logits=1))
    x = torch.randn(8, 16)
    expected = distillation(student, x).loss
    expected.backward()
    gradients = [parameter.grad.clone() for parameter in student.parameters()]
    student.zero_grad()
    compiled = torch.compile(student, backend="vnm", options={"vnm.policy": "memory"})
    found = distillation(compiled, x).loss
    found.backward()
    torch.testing.assert_close(found, expected)
    for parameter, gradient in zip(student.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def shallow():
    return hf.BertModel(hf.BertConfig(**TINY))


def masked(model):
    vnm.train.begin(model, "16:2:8", steps=9)
    return model


WRONG = {
    "a copy made after the masks": (BadModel, "before vnm.train.begin", lambda t, s: Distillation(masked(t))),
    "the model itself": (BadModel, "share parameters", lambda t, s: Distillation(s)(s, **batch())),
    "a part of it": (BadModel, "share parameters", lambda t, s: Distillation(s.encoder, Terms(**ONLY, logits=1))(s)),
    "no hidden states": (BadModel, "layers=", lambda t, s: Distillation(Net())(Net(), torch.randn(2, 16))),
    "no such module": (BadOption, "no such module", lambda t, s: Distillation(t, layers=["encoder.layer.9"])),
    "no modules": (BadOption, "empty", lambda t, s: Distillation(t, layers=[])),
    "another depth": (
        BadModel,
        "2 hidden states",
        lambda t, s: Distillation(t)(hf.BertModel(hf.BertConfig(**TINY)), **batch()),
    ),
    "no logits": (BadModel, "no logits", lambda t, s: Distillation(t, Terms(**ONLY, logits=1))(s, **batch())),
    "no loss": (BadLoss, "labels", lambda t, s: Distillation(t, Terms(task=1))(s, **batch())),
    "no term": (BadOption, "no term", lambda t, s: Terms(**ONLY, task=1)),
    "negative": (BadOption, "negative", lambda t, s: Terms(hidden=-1)),
    "not finite": (BadOption, "logits", lambda t, s: Terms(logits=float("nan"))),
    "cold": (BadOption, "temperature", lambda t, s: Terms(temperature=0)),
}


@pytest.mark.parametrize("name", WRONG)
def test_mistakes_are_named(name):
    kind, text, call = WRONG[name]
    with pytest.raises(kind, match=text):
        call(*pair())


def distil(folder, steps=2, batch_size=4, accumulated=2, callbacks=()):
    torch.manual_seed(0)
    teacher, student = pair(hf.BertForSequenceClassification, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    arguments = hf.TrainingArguments(
        str(folder), max_steps=steps, per_device_train_batch_size=batch_size, gradient_accumulation_steps=accumulated,
        save_strategy="no", report_to=[], use_cpu=True, learning_rate=0.1, logging_steps=1, disable_tqdm=True,
        optim="sgd", lr_scheduler_type="constant",
    )  # fmt: skip
    terms = Terms(hidden=1, embeddings=0, logits=1)
    trainer = vnm.train.DistillationTrainer(
        student, arguments, train_dataset=Data(), distillation=Distillation(teacher, terms), callbacks=list(callbacks)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.train()
    return trainer


def test_in_a_trainer_accumulated_batches_weigh_the_same(tmp_path):
    one, two = distil(tmp_path), distil(tmp_path, batch_size=8, accumulated=1)
    for a, b in zip(one.model.parameters(), two.model.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    (first, *_) = (entry for entry in one.state.log_history if "loss" in entry)
    assert first["loss"] == pytest.approx(first["distillation_hidden"] + first["distillation_logits"], rel=1e-3)


def test_in_a_trainer_with_masks(tmp_path):
    trainer = distil(tmp_path, steps=6, callbacks=[vnm.train.MaskCallback("16:2:8", vnm.train.MaskDecay(every=2))])
    assert vnm.matches(trainer.model.bert.encoder.layer[0].intermediate.dense.weight, "16:2:8")
    assert trainer.evaluate(Data())["eval_loss"] > 0


def test_what_an_evaluation_returns_has_no_hidden_states(tmp_path):
    predictions = distil(tmp_path, steps=1).predict(Data()).predictions
    assert predictions.shape == (32, 2)
