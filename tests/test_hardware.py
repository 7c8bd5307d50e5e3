"""The table of devices: a card is told by its name, then by its architecture."""

from __future__ import annotations

from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch

from vnm_compile.codegen.virtual_device import device_target, virtual_device
from vnm_compile.cost import CostModel
from vnm_compile.hardware import CARDS, CPU_CORE, TARGETS, machine_of, target_of
from vnm_compile.layout import Layout
from vnm_compile.spec import Spec


def properties(name, capability, multiprocessors):
    """What torch reports of an NVIDIA GPU."""
    return SimpleNamespace(
        name=name,
        major=capability[0],
        minor=capability[1],
        warp_size=32,
        multi_processor_count=multiprocessors,
        max_threads_per_multi_processor=2048,
        shared_memory_per_block_optin=232448,
        L2_cache_size=50 << 20,
    )


@pytest.mark.parametrize(
    ("name", "capability", "multiprocessors", "bandwidth"),
    [
        ("NVIDIA H100 80GB HBM3", (9, 0), 132, 3.35e12),
        ("NVIDIA H100 PCIe", (9, 0), 114, 2.0e12),
        ("NVIDIA H100 NVL", (9, 0), 132, 3.9e12),
        ("NVIDIA H200", (9, 0), 132, 4.8e12),
        ("NVIDIA GH200 480GB", (9, 0), 132, 4.0e12),
        ("NVIDIA A100-SXM4-40GB", (8, 0), 108, 1.555e12),
        ("NVIDIA A100 80GB PCIe", (8, 0), 108, 1.935e12),
        ("NVIDIA GeForce RTX 4090", (8, 9), 128, 1.008e12),
        ("NVIDIA L4", (8, 9), 58, 0.3e12),
        ("NVIDIA L40S", (8, 9), 142, 0.864e12),
    ],
)
def test_a_card_is_told_by_its_name(name, capability, multiprocessors, bandwidth):
    found = target_of(properties(name, capability, multiprocessors))
    assert (found.card, found.bandwidth, found.capability) == (name, bandwidth, capability)
    listed = [card for card in CARDS if card.bandwidth == bandwidth and card.capability == capability]
    assert found.half_flops in [card.half_flops for card in listed]


def test_a_card_that_is_not_listed_has_its_share_of_its_architecture():
    found = target_of(properties("NVIDIA GeForce RTX 4060", (8, 9), 24))
    assert found.half_flops == pytest.approx(TARGETS["sm_89"].half_flops * 24 / 128)
    newer = target_of(properties("NVIDIA B300", (10, 3), 148))
    assert (newer.name, newer.arch) == ("sm_103", 103)
    assert newer.bandwidth == TARGETS["sm_100"].bandwidth


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.card)
def test_a_virtual_device_is_the_card_that_it_stands_for(card):
    with virtual_device(card):
        assert target_of(torch.cuda.get_device_properties()) == card == device_target()


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.card)
def test_rates_are_those_of_multiprocessors_at_the_clock(card):
    """Tensor cores do a whole power of two of operations a cycle, twice as many in two bytes as in tf32."""
    per_cycle = card.half_flops / (card.multiprocessors * card.clock)
    assert min(abs(per_cycle / 2**k - 1) for k in range(8, 15)) < 0.04
    assert card.tf32_flops == pytest.approx(card.half_flops / 2, rel=0.02)
    assert card.fp32_flops <= card.tf32_flops


def test_limits_are_those_of_the_machine():
    sizes = (4096, 4096, Layout(Spec(64, 2, 8), 4096, 4096), torch.bfloat16)
    assert CostModel.on("cpu", *sizes).balance == 25.0
    assert machine_of("cpu") is CPU_CORE
    with patch.object(torch.cuda, "is_available", lambda: False):
        assert CostModel.on("cuda", *sizes).balance == pytest.approx(206, rel=0.01)
    for card in CARDS:
        with virtual_device(card):
            assert CostModel.on("cuda", *sizes).balance == card.half_flops / card.bandwidth


def test_fp32_counts_as_what_it_is_computed_in():
    sizes = (4096, 4096, Layout(Spec(64, 2, 8), 4096, 4096), torch.float32)
    card = CARDS[0]
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        with virtual_device(card):
            for precision, rate in (("ieee", card.fp32_flops), ("tf32", card.tf32_flops)):
                torch.backends.cuda.matmul.fp32_precision = precision
                assert CostModel.on("cuda", *sizes).balance == rate / card.bandwidth
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def test_a_dense_layer_has_no_pattern():
    stored = Layout(Spec(64, 2, 8), 256, 128)
    dense, sparse = (CostModel.on("cpu", 256, 128, layout, torch.float32) for layout in (None, stored))
    for tokens in (1, 1000):
        assert dense.time_at(tokens, sparse=True) == dense.time_at(tokens, sparse=False)
        assert dense.time_at(tokens, sparse=False) == sparse.time_at(tokens, sparse=False)
