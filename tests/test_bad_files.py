"""Bad files: model directories, calibration data and outputs of the command line. One sentence, exit code 1."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.test_bad_inputs import named

# Nothing is unpickled, no code of a model is run, no network is asked.


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("unpickled",))


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("llama")
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def copied(llama, tmp_path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    for path in llama.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def _config(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        path = folder / "config.json"
        content = json.loads(path.read_text())
        changed = change(content)
        path.write_text(json.dumps(content if changed is None else changed))

    return spoil


def _cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))


def _missing_weights(folder: Path) -> None:
    save_file({"model.embed_tokens.weight": torch.zeros(64, 32)}, folder / "model.safetensors", {"format": "pt"})


def _wrong_shapes(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file(
        {name: value[:1].clone() for name, value in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
    )


def _garbage_index(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../../../etc/passwd"}}')


SPOILS: dict[str, Callable[[Path], Any]] = {
    "no config": lambda f: (f / "config.json").unlink(),
    "empty config": lambda f: (f / "config.json").write_text(""),
    "broken config": lambda f: (f / "config.json").write_text("{"),
    "config a list": lambda f: (f / "config.json").write_text("[]"),
    "config a number": lambda f: (f / "config.json").write_text("5"),
    "config null": lambda f: (f / "config.json").write_text("null"),
    "config not UTF-8": lambda f: (f / "config.json").write_bytes(b'{"a": "\xff\xfe"}'),
    "config a directory": lambda f: ((f / "config.json").unlink(), (f / "config.json").mkdir()),
    "auto_map": _config(lambda c: c.update(auto_map={"AutoModel": "code.Model"})),
    "no such class": _config(lambda c: c.update(architectures=["NoSuchModel"])),
    "class a module function": _config(lambda c: c.update(architectures=["logging"])),
    "class not a model": _config(lambda c: c.update(architectures=["LlamaConfig"])),
    "class dunder": _config(lambda c: c.update(architectures=["__builtins__"])),
    "architectures text": _config(lambda c: c.update(architectures="LlamaForCausalLM")),
    "architectures numbers": _config(lambda c: c.update(architectures=[5])),
    "hidden size text": _config(lambda c: c.update(hidden_size="large")),
    "hidden size negative": _config(lambda c: c.update(hidden_size=-32)),
    "other hidden size": _config(lambda c: c.update(hidden_size=64)),
    "no weights": lambda f: (f / "model.safetensors").unlink(),
    "empty weights": lambda f: (f / "model.safetensors").write_bytes(b""),
    "weights cut": _cut,
    "weights text": lambda f: (f / "model.safetensors").write_text("not a safetensors file at all"),
    "pickle": _pickle,
    "pickle by another name": lambda f: (f / "model.safetensors").write_bytes(pickle.dumps(Bomb())),
    "weights missing": _missing_weights,
    "weights of other shapes": _wrong_shapes,
    "index outside": _garbage_index,
}


def _run(*arguments: Any) -> Any:
    from typer.testing import CliRunner

    from vnm_compile.cli.app import app

    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def _one_sentence(result: Any) -> None:
    assert result.exit_code == 1, result.output
    assert "error:" in result.output, repr(result.exception)
    assert "Traceback" not in result.output
    assert isinstance(result.exception, SystemExit)


@pytest.mark.parametrize("name", named(SPOILS))
def test_spoiled_model_directories(name, copied, tmp_path):
    SPOILS[name](copied)
    before = {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()}
    _one_sentence(_run("prune", copied, "--spec", "16:2:8", "--out", tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    assert {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()} == before
    if not name.startswith("weights miss"):
        _one_sentence(_run("explain", copied))


OUTS: dict[str, Callable[[Path, Path], Path]] = {
    "inside the model": lambda model, tmp: model / "sparse",
    "the model": lambda model, tmp: model,
    "a file": lambda model, tmp: _touched(tmp / "file"),
    "below a file": lambda model, tmp: _touched(tmp / "file") / "out",
    "too long": lambda model, tmp: tmp / ("x" * 300),
    "no place": lambda model, tmp: Path("/proc/nowhere/out"),
}


def _touched(path: Path) -> Path:
    path.write_text("x")
    return path


@pytest.mark.parametrize("name", named(OUTS))
def test_outputs_that_cannot_be_written(name, copied, tmp_path):
    _one_sentence(_run("prune", copied, "--spec", "16:2:8", "--out", OUTS[name](copied, tmp_path)))


CALIBRATIONS: dict[str, Callable[[Path], Any]] = {
    "empty.txt": lambda p: p.write_text(""),
    "binary.txt": lambda p: p.write_bytes(b"\xff\xfe\x00"),
    "empty.safetensors": lambda p: p.write_bytes(b""),
    "cut.safetensors": lambda p: p.write_bytes(b"\x10\0\0\0\0\0\0\0{"),
    "pickle.safetensors": lambda p: p.write_bytes(pickle.dumps(Bomb())),
    "keys.safetensors": lambda p: save_file({"tokens": torch.zeros(2, 4, dtype=torch.long)}, p),
    "float.safetensors": lambda p: save_file({"input_ids": torch.zeros(2, 4)}, p),
    "beyond.safetensors": lambda p: save_file({"input_ids": torch.full((2, 4), 10**6)}, p),
    "no_rows.safetensors": lambda p: save_file({"input_ids": torch.zeros(0, 4, dtype=torch.long)}, p),
    "folder": lambda p: p.mkdir(),
    "pickle.pt": lambda p: p.write_bytes(pickle.dumps(Bomb())),
}


@pytest.mark.parametrize("name", named(CALIBRATIONS))
def test_calibration_files(name, copied, tmp_path):
    file = tmp_path / name
    CALIBRATIONS[name](file)
    out = tmp_path / "out"
    _one_sentence(_run("prune", copied, "--spec", "16:2:8", "--method", "wanda", "--calibration", file, "--out", out))
    assert not out.exists()
