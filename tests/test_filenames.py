"""Names never become paths: file names of hostile layer names, and where they are used."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import vnm_compile as vnm
from vnm_compile.filenames import file_name

HOSTILE = [
    "",
    ".",
    "..",
    "../outside",
    "/absolute/path",
    "a/b",
    "a\\b",
    "C:\\windows",
    "nul",
    "con.txt",
    "nul\0byte",
    "line\nbreak",
    "x" * 4000,
    "ä" * 200,
    "\ud800",
    "name.",
    " ",
    "-rf",
    "~",
    "%2e%2e",
    "A",
    "[/red]",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_name_is_one_plain_component(tmp_path, name):
    found = file_name(name, ".safetensors")
    path = tmp_path / found
    assert path.parent == tmp_path
    path.write_text("a file")
    assert [each.name for each in tmp_path.iterdir()] == [found]
    assert len(found.encode()) < 200


def test_harmless_names_stay():
    for name in ("net.0", "encoder.layer.11.output.dense", "triton_tem_fused_0", "a-b"):
        assert file_name(name) == name


def test_names_that_a_file_system_may_confuse_are_told_apart():
    names = [*HOSTILE, "net.0", "Net.0", "NET.0", "a", file_name("A"), file_name("../outside")]
    assert len({file_name(name).casefold() for name in names}) == len(names)


@given(st.text(st.characters(exclude_categories=()), max_size=300))
def test_every_name_is_one_component(name):
    found = file_name(name)
    assert found not in ("", ".", "..")
    assert not set(found) & set('/\\:*?"<>|\0\n')
    assert found == file_name(name)


class Named(nn.Module):
    """A model whose one layer has any name; add_module refuses dots and nothing else."""

    def __init__(self, name):
        super().__init__()
        self._modules[name] = nn.Linear(32, 32)
        self.net = nn.Linear(32, 32)

    def forward(self, x):
        for layer in self._modules.values():
            x = layer(x)
        return x


@pytest.mark.parametrize("name", ["../outside", "/{}/outside", "x" * 300, "..", "nul\0", "[/red]", "NET"])
def test_checkpoints_stay_in_their_directory(tmp_path, name):
    name = name.format(tmp_path)
    directory = tmp_path / "run"
    arguments = {"calibration": [torch.randn(16, 32)], "checkpoint": directory, "progress": False}
    model = Named(name)
    vnm.sparsify(model, "16:2:8", "wanda", **arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert len(list(directory.iterdir())) == 2
    assert all(path.is_file() for path in directory.iterdir())
