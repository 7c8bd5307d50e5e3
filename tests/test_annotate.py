"""Which layers an annotation reaches, and what it survives."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from vnm_compile import Spec, VNMError, annotate
from vnm_compile.annotate import annotation_of, annotations_by_weight, linear_layers


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q = nn.Linear(64, 64)
        self.mlp = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64))
        self.tiny = nn.Linear(64, 8)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(128, 64)
        self.block = Block()
        self.head = nn.Linear(64, 128, bias=False)
        self.head.weight = self.embedding.weight


def test_defaults_leave_out_what_cannot_be_meant():
    assert annotate(Tied(), "64:2:8") == ["block.q", "block.mlp.0", "block.mlp.2"]
    tiny = GPT2Config(n_layer=1, n_embd=64, n_head=2, vocab_size=96, bos_token_id=0, eos_token_id=0)
    names = annotate(GPT2LMHeadModel(tiny), "16:2:8")
    assert names == [f"transformer.h.0.{name}" for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")]


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        ("q", None, ["q"]),
        ("mlp", None, ["mlp.0", "mlp.2"]),
        ("mlp.*", "mlp.2", ["mlp.0"]),
        (nn.Linear, "tiny", ["q", "mlp.0", "mlp.2"]),
        (["q", "tiny"], None, ["q", "tiny"]),
        (None, "mlp.*", ["q"]),
    ],
)
def test_selectors(include, exclude, expected):
    assert annotate(Block(), "64:2:8", include=include, exclude=exclude) == expected


def test_a_pattern_per_selector():
    block = Block()
    annotate(block, {"mlp.0": "64:2:16", "mlp.*": Spec(64, 2, 8), "q": None})
    found = {layer.name: annotation_of(layer.module) for layer in linear_layers(block)}
    assert str(found["mlp.0"].spec) == "64:2:16"
    assert str(found["mlp.2"].spec) == "64:2:8"
    assert found["q"] is None


@pytest.mark.parametrize("selector", ["nothing", "*.nothing", Conv1D])
def test_a_selector_that_fits_nothing_is_an_error(selector):
    with pytest.raises(VNMError, match="no linear layer"):
        annotate(Block(), "64:2:8", include=selector)
    with pytest.raises(VNMError, match="no linear layer"):
        annotate(Block(), {selector: "64:2:8"})


def copied(module):
    return copy.deepcopy(module)


def pickled(module):
    return pickle.loads(pickle.dumps(module))


def saved(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def halved(module):
    return module.half()


def reassigned(module):
    for layer in linear_layers(module):
        layer.module.weight = nn.Parameter(torch.randn_like(layer.module.weight))
    return module


@pytest.mark.parametrize("change", [copied, pickled, saved, halved, reassigned])
def test_annotations_survive(change):
    block = Block()
    annotate(block, {"q": "64:2:8", "mlp.0": "32:2:4"})
    changed = change(block)
    by_weight = annotations_by_weight()
    assert str(by_weight[id(changed.q.weight)].spec) == "64:2:8"
    assert by_weight[id(changed.mlp[0].weight)].name == "mlp.0"
    assert id(changed.mlp[2].weight) not in by_weight
