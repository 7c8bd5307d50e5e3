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

from vnm_compile import Spec, VNMError, annotate, compress_model, detect, sparsify
from vnm_compile.annotate import annotation_of, annotations_by_weight
from vnm_compile.layers import linear_layers


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


def test_what_says_nothing_is_an_error():
    for spec, include, message in (
        (None, None, "None is not a V:N:M pattern"),
        ({}, None, "mapping is empty"),
        ({"q": None}, None, r"no linear layer \(of 4\)"),
        ("64:2:8", [], "include is empty"),
        ("64:2:8", 3, "include is 3"),
        ("64:2:8", [None], "include is None"),
        ({3: "64:2:8"}, None, "a key of spec is 3"),
        ("1024:2:8", None, r"no linear layer \(of 4\)"),
        ("64:2:512", None, r"no linear layer \(of 4\)"),
    ):
        block = Block()
        with pytest.raises(VNMError, match=message):
            annotate(block, spec, include=include)
        assert not any(annotation_of(layer.module) for layer in linear_layers(block))
    with pytest.raises(VNMError, match="has no linear layer"):
        annotate(nn.Sequential(nn.ReLU()), "64:2:8")


def test_a_shared_weight_is_refused_by_name_and_left_out_by_glob():
    def overlapping():
        tied = Tied()
        tied.head.weight = nn.Parameter(tied.embedding.weight.detach()[:])
        return tied

    for make in (Tied, overlapping):
        for change in (annotate, sparsify, compress_model):
            tied = make()
            before = tied.embedding.weight.clone()
            with pytest.raises(VNMError, match=r"^head: its weight is also embedding\.weight"):
                change(tied, "64:2:8", include=["head", "block.q"])
            assert torch.equal(tied.embedding.weight, before)
            assert tied.head.weight.data_ptr() == tied.embedding.weight.data_ptr()
        for include in ("*", nn.Linear):
            assert "head" not in annotate(make(), "64:2:8", include=include)


def test_names_of_a_compiled_model_and_of_its_original_are_the_same():
    block = Block()
    block.mlp = torch.compile(block.mlp)
    compiled = torch.compile(block)
    names = [layer.name for layer in linear_layers(block)]
    assert names == ["q", "mlp.0", "mlp.2", "tiny"]
    assert [layer.name for layer in linear_layers(compiled)] == names
    for model in (block, compiled):
        for include in ("mlp.0", "_orig_mod.mlp.0", "_orig_mod.mlp._orig_mod.0"):
            assert annotate(model, "64:2:8", include=include) == ["mlp.0"]
            assert annotate(model, {include: "64:2:8"}) == ["mlp.0"]


class Adapted(nn.Module):
    """A layer with adapters as peft makes it, and one as others do."""

    adapter_layer_names = ("down", "up")

    def __init__(self):
        super().__init__()
        self.base_layer = nn.Linear(64, 64)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(64, 64, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(64, 64, bias=False)})
        self.down = nn.ModuleDict({"default": nn.Linear(64, 64)})


def test_adapters_are_no_targets_unless_they_are_meant():
    model = nn.ModuleDict({"q": Adapted(), "explorations": nn.Linear(64, 64)})
    for include in (None, "*", nn.Linear):
        assert annotate(model, "64:2:8", include=include) == ["q.base_layer", "explorations"]
    assert annotate(model, "64:2:8", include="*.lora_A.*") == ["q.lora_A.default"]
    assert annotate(model, "64:2:8", include="q.down.default") == ["q.down.default"]
    assert detect(torch.zeros(64, 64)) is None
