"""Checkpoints of pruning that are cut, tampered with or cannot be written: an error that names the file."""

from __future__ import annotations

import json
import pickle

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import vnm_compile as vnm


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 48)).eval()


def arguments(directory):
    data = [torch.randn(64, 32, generator=torch.Generator().manual_seed(0))]
    return {"method": "wanda", "calibration": data, "checkpoint": directory, "progress": False}


class Evil:
    def __reduce__(self):
        return pytest.fail, ("unpickled",)


def described(path, change):
    """The file again, its description changed."""
    with safe_open(path, "pt") as file:
        weight, found = file.get_tensor("weight"), json.loads(file.metadata()["vnm_compile"])
    weight, found = change(weight.clone(), found)
    save_file({"weight": weight}, path, {"vnm_compile": json.dumps(found)})


def smaller(weight, found):
    return weight[:-1].clone(), found


def written_to(weight, found):
    weight[weight != 0] *= 2
    return weight, found


DAMAGE = {
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-40]),
    "cut header": lambda path: path.write_bytes(path.read_bytes()[:40]),
    "pickle": lambda path: path.write_bytes(pickle.dumps(Evil())),
    "no description": lambda path: save_file({"weight": torch.zeros(64, 32)}, path),
    "no weight": lambda path: save_file({"other": torch.zeros(64, 32)}, path, {"vnm_compile": "{}"}),
    "description a list": lambda path: described(path, lambda weight, found: (weight, [1])),
    "description null": lambda path: described(path, lambda weight, found: (weight, None)),
    "another shape": lambda path: described(path, smaller),
    "another dtype": lambda path: described(path, lambda weight, found: (weight.half(), found)),
    "another weight": lambda path: described(path, written_to),
    "dense": lambda path: described(path, lambda weight, found: (torch.ones_like(weight), found)),
    "error text": lambda path: described(path, lambda weight, found: (weight, {**found, "output_error": "x"})),
}


def test_damaged_files_are_refused(tmp_path):
    expected = model()
    vnm.sparsify(expected, "16:2:8", **arguments(tmp_path))
    path = tmp_path / "0.safetensors"
    whole = path.read_bytes()
    for name, damage in DAMAGE.items():
        path.write_bytes(whole)
        damage(path)
        other = model()
        with pytest.raises(vnm.VNMError, match=r"^0: .*0.safetensors cannot be read .*; delete it"):
            vnm.sparsify(other, "16:2:8", **arguments(tmp_path))
        assert all(torch.equal(*pair) for pair in zip(other.parameters(), model().parameters(), strict=True)), name
    path.unlink()
    again = model()
    vnm.sparsify(again, "16:2:8", **arguments(tmp_path))
    assert torch.equal(again[0].weight, expected[0].weight)
    assert path.read_bytes() == whole


def test_directories_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("x")
    for directory in (tmp_path / "file", tmp_path / "file" / "below"):
        other = model()
        with pytest.raises(vnm.VNMError, match=r"checkpoint=.* is no directory that can be written to"):
            vnm.sparsify(other, "16:2:8", **arguments(directory))
        assert torch.equal(other[0].weight, model()[0].weight)


def test_links_that_wait_in_the_directory_are_not_followed(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "run" / "0.safetensors.unfinished").symlink_to(tmp_path / "victim")
    vnm.sparsify(model(), "16:2:8", **arguments(tmp_path / "run"))
    assert (tmp_path / "victim").read_text() == "precious"
    assert not (tmp_path / "run" / "0.safetensors").is_symlink()
