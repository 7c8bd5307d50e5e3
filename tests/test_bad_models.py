"""Models whose weights cannot be handled: one VNMError that names the layer and the way out, and nothing changed."""

from __future__ import annotations

import re
import warnings

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import parametrize, prune

from tests.support import make_sparse_
from vnm_compile import VNMError, VNMTensor, annotate, compress_model, decompress_model
from vnm_compile.checks import why_unusable
from vnm_compile.layers import linear_layers

SPEC = "16:2:8"


class Symmetric(nn.Module):
    def forward(self, weight):
        return weight.triu() + weight.triu(1).T


class Quantised(torch.Tensor):
    """A subclass with storage of its own, as quantisation libraries have."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=torch.float32)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return Quantised(args[0].inner)
        raise NotImplementedError(func)


class Offload:
    """What accelerate leaves on an offloaded module."""


def normed(layer):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nn.utils.weight_norm(layer)


def set_weight(make):
    def change(layer):
        layer.weight = nn.Parameter(make(layer.weight.detach()), requires_grad=False)

    return change


def offloaded(layer):
    layer.to("meta")
    layer._hf_hook = Offload()


def flat(layer):
    buffer = layer.weight.detach().flatten()
    del layer._parameters["weight"]
    layer.weight = buffer.view(64, 64)


def buffer(layer):
    weight = layer.weight.detach()
    del layer._parameters["weight"]
    layer.register_buffer("weight", weight)


def fake(layer):
    layer.weight = nn.Parameter(FakeTensorMode().from_tensor(layer.weight.detach()))


BROKEN = {
    "meta": (lambda layer: layer.to("meta"), "meta device"),
    "offloaded": (offloaded, "offloaded"),
    "fake": (fake, "FakeTensor"),
    "weight_norm": (normed, "remove_weight_norm"),
    "weight_norm parametrization": (nn.utils.parametrizations.weight_norm, "remove_parametrizations"),
    "orthogonal": (nn.utils.parametrizations.orthogonal, "remove_parametrizations"),
    "own parametrization": (
        lambda layer: parametrize.register_parametrization(layer, "weight", Symmetric()),
        r"Symmetric.*remove_parametrizations",
    ),
    "pruned": (lambda layer: prune.l1_unstructured(layer, "weight", 0.5), "prune.remove"),
    "spectral_norm": (nn.utils.spectral_norm, "remove_spectral_norm"),
    "int8": (set_weight(lambda w: w.to(torch.int8)), "int8"),
    "packed uint8": (set_weight(lambda w: w.to(torch.uint8).view(-1, 1)[::2]), "uint8"),
    "packed in bfloat16": (set_weight(lambda w: w.bfloat16().view(-1, 1)[::4].clone()), "another form"),
    "shard": (set_weight(lambda w: w[:16].clone()), "another form"),
    "empty shard": (set_weight(lambda w: w.new_empty(0)), "another form"),
    "complex": (set_weight(lambda w: w.to(torch.complex64)), "complex64"),
    "float8": (set_weight(lambda w: w.to(torch.float8_e4m3fn)), "float8"),
    "quantised": (set_weight(Quantised), "Quantised"),
    "sparse": (set_weight(lambda w: w.to_sparse_csr()), "sparse_csr"),
    "flat parameter": (flat, "of its own"),
    "buffer": (buffer, "is a buffer"),
}


def model():
    return make_sparse_(nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64)), SPEC)


@pytest.mark.parametrize("kind", BROKEN)
def test_the_reason_is_known(kind):
    broken = model()
    change, reason = BROKEN[kind]
    change(broken[2])
    first, second = linear_layers(broken)
    assert why_unusable(first) is None
    assert re.search(reason, why_unusable(second))


def test_lazy_layers_have_a_reason():
    layer = next(iter(linear_layers(nn.Sequential(nn.LazyLinear(64)))))
    assert "run one batch" in why_unusable(layer)


def test_what_is_ordinary_has_no_reason():
    layers = {
        "plain": lambda layer: None,
        "half": lambda layer: layer.half(),
        "double": lambda layer: layer.double(),
        "strided": set_weight(lambda w: w.t().contiguous().t()),
        "view of a buffer": set_weight(lambda w: torch.cat([w.flatten(), w.flatten()])[: w.numel()].view(64, 64)),
        "frozen": lambda layer: layer.requires_grad_(False),
    }
    for name, change in layers.items():
        usable = model()
        change(usable[2])
        for layer in linear_layers(usable):
            assert why_unusable(layer, written=True) is None, name


def test_weights_that_cannot_be_written():
    for make in (lambda w: w[:1].expand(64, 64), lambda w: torch.inference_mode()(w.clone)()):
        broken = model()
        set_weight(make)(broken[2])
        layer = list(linear_layers(broken))[1]
        assert why_unusable(layer) is None
        assert "clone" in why_unusable(layer, written=True)


def contents(module):
    return {name: (id(value), value._version) for name, value in [*module.named_parameters(), *module.named_buffers()]}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_model_with_such_a_layer_is_refused_whole(kind):
    broken = model()
    BROKEN[kind][0](broken[2])
    before = contents(broken)
    for spec in (None, SPEC):
        with pytest.raises(VNMError, match=r"^2: its weight") as caught:
            compress_model(broken, spec)
        assert "exclude" in str(caught.value) or kind in ("meta", "offloaded", "fake")
    if kind not in ("meta", "offloaded", "fake"):
        with pytest.raises(VNMError, match=r"^2: its weight"):
            annotate(broken, SPEC)
    assert contents(broken) == before
    assert annotate(broken, SPEC, exclude="2") == ["0"]
    assert compress_model(broken, exclude="2") == ["0"]


def test_layers_of_no_size_are_left_out():
    assert annotate(nn.Sequential(nn.Linear(64, 64), nn.Linear(0, 64), nn.Linear(64, 0)), "1:1:4") == ["0"]


def test_annotating_needs_no_values():
    with torch.device("meta"):
        layers = nn.Sequential(nn.Linear(64, 64))
    assert annotate(layers, SPEC) == ["0"]


def test_lazy_layers_are_refused():
    with pytest.raises(VNMError, match="run one batch"):
        compress_model(nn.Sequential(nn.LazyLinear(64)), SPEC)


def test_decompressing_without_values_is_refused():
    broken = model()
    compress_model(broken)
    broken[2].to("meta")
    with pytest.raises(VNMError, match=r"^2: its weight is on the meta device"):
        decompress_model(broken)
    assert isinstance(broken[0].weight, VNMTensor)


def test_shared_compressed_weights_stay_shared():
    shared = model()
    compress_model(shared)
    shared.append(nn.Linear(64, 64))
    shared[3].weight = shared[2].weight
    assert decompress_model(shared) == ["0", "2", "3"]
    assert shared[3].weight is shared[2].weight
