"""Methods as objects: their options, the table of names, and a method of one's own."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

import vnm_compile as vnm
from vnm_compile.prune import project
from vnm_compile.prune.pruned import Pruned


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 48), nn.GELU(), nn.Linear(48, 8)).eval()


def test_a_name_means_the_defaults_and_an_object_carries_the_options():
    data = [torch.randn(64, 32) @ torch.randn(32, 32)]

    def pruned(method):
        result = model()
        report = vnm.sparsify(result, "16:2:8", method, calibration=data, progress=False)
        assert report.method == "second_order"
        return result[2].weight

    assert torch.equal(pruned("second_order"), pruned(vnm.prune.SecondOrder()))
    assert not torch.equal(pruned("second_order"), pruned(vnm.prune.SecondOrder(damping=10.0)))


def test_every_method_is_in_the_table_with_options_that_have_defaults():
    for name, method in vnm.prune.METHODS.items():
        assert method.name == name
        assert method.summary
        assert dataclasses.is_dataclass(method())
        with pytest.raises(dataclasses.FrozenInstanceError):
            method().name = "another"


def test_a_method_of_ones_own():
    """Random pruning, in the words of the table."""

    @dataclasses.dataclass(frozen=True)
    class Random(vnm.prune.LayerMethod):
        seed: int = 0
        name = "random"
        summary = "keep any weights"
        needs_calibration = False

        def prune_layer(self, layer, spec, moment):
            generator = torch.Generator().manual_seed(self.seed)
            weight = layer.weight.detach()
            scores = torch.rand(weight.shape, generator=generator)
            return Pruned.of(layer, spec, weight * project(scores, spec), weight)

    pruned = model()
    report = vnm.sparsify(pruned, "16:2:8", Random(seed=3), progress=False)
    assert report.method == "random"
    assert vnm.matches(pruned[0].weight, "16:2:8")
    assert not torch.equal(pruned[0].weight, model()[0].weight)
