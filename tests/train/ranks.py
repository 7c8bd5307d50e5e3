"""What one process of two does in `test_distributed.py`: `python -m tests.train.ranks WAY RANK FOLDER`.

Trains a model wrapped by DDP or FSDP2 (`fully_shard`), gradients by gloo, on its half of each batch, and prints how far
the weights are from those of a training in one process.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

import vnm_compile as vnm
from vnm_compile import train

SPEC, STEPS = "16:2:8", 12
RECIPE = train.MaskDecay(every=2, fixed=0.25)


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))


def step(call, optimizer, x) -> None:
    optimizer.zero_grad()
    (call(x) - x).square().mean().backward()
    optimizer.step()


def alone() -> nn.Module:
    net = model()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    train.begin(net, SPEC, RECIPE, STEPS, optimizer=optimizer)
    torch.manual_seed(1)
    for _ in range(STEPS):
        step(net, optimizer, torch.randn(8, 32))
    vnm.finalize(net)
    return net


def wrapped(way: str, rank: int) -> nn.Module:
    net = model()
    training = train.begin(net, SPEC, RECIPE)
    if way == "ddp":
        call: nn.Module = nn.parallel.DistributedDataParallel(net)
    else:
        from torch.distributed.fsdp import fully_shard

        for layer in (net[0], net[2]):
            fully_shard(layer)
        call = fully_shard(net)
    optimizer = torch.optim.AdamW(call.parameters(), lr=1e-2)
    training.start(STEPS, optimizer=optimizer)
    if way == "fsdp2":
        nan_is_told_by_all(net, training, rank)
    torch.manual_seed(1)
    for _ in range(STEPS):
        step(call, optimizer, torch.randn(8, 32).chunk(2)[rank])
    training.finalize()
    assert set(net.state_dict()) == set(model().state_dict())
    if way == "ddp":  # whose list of buffers is empty now, which it takes for an error
        call = nn.parallel.DistributedDataParallel(net)
    x = torch.randn(3, 32)
    expected = alone()(x)
    with torch.no_grad():
        torch.testing.assert_close(call(x), expected.detach(), atol=1e-5, rtol=1e-4)
    step(call, torch.optim.SGD(call.parameters(), lr=0.0), x)  # and it trains on
    return net


def nan_is_told_by_all(net: nn.Module, training: train.Training, rank: int) -> None:
    """In whoever's part of a weight it is, masks moving or not: one process alone would leave the others waiting."""
    part = net[2].parametrizations.weight.original.to_local()
    kept = part.detach().clone()
    for step in (1, STEPS - 1):  # the next step moves masks; it is a fixed one
        training.step_number = step
        if rank == 1:
            part.detach()[0, 0] = torch.nan
        with pytest.raises(vnm.VNMError, match="NaN"):
            training.step()
        part.detach().copy_(kept)
    training.step_number = 0


def main() -> None:
    way, rank, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2)
    net = wrapped(way, rank)
    for ours, theirs in zip(net.parameters(), alone().parameters(), strict=True):
        whole = ours.full_tensor() if hasattr(ours, "full_tensor") else ours
        torch.testing.assert_close(whole.detach(), theirs.detach(), atol=1e-5, rtol=1e-4)
        if whole.dim() == 2:
            assert vnm.matches(whole.detach(), SPEC)
    dist.destroy_process_group()
    print("right")


if __name__ == "__main__":
    main()
