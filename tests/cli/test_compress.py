"""`compress`, `decompress`, `convert` and `info`: directories in, directories out, and what they hold."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import vnm_compile as vnm
from tests.cli.test_prune_and_explain import one_line, run
from tests.support import random_sparse

LINEARS = 14


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    """A pruned Llama, stored dense with zeros: 1:2:4, which is what others store, too."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=32,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    for i, layer in enumerate(each for each in model.model.modules() if isinstance(each, torch.nn.Linear)):
        layer.weight.data = random_sparse(*layer.weight.shape, "1:2:4", seed=i)
    folder = tmp_path_factory.mktemp("pruned") / "dense"
    model.save_pretrained(folder)
    (folder / "notes.txt").write_text("of the model")
    return folder


@pytest.fixture(scope="module")
def compressed(dense, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("compressed") / "model"
    shown = one_line(run("compress", dense, "--out", out))
    assert f"{LINEARS} layers are 1:2:4" in shown or "layers are" in shown
    assert "became" in shown
    return out


def logits(folder: Path) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder)
    return model(torch.arange(12).view(2, 6)).logits


def test_compress_and_decompress(dense, compressed, tmp_path):
    assert (compressed / "notes.txt").read_text() == "of the model"
    model = AutoModelForCausalLM.from_pretrained(compressed)
    assert sum(isinstance(each, vnm.VNMTensor) for each in model.parameters()) == LINEARS
    assert torch.equal(logits(compressed), logits(dense))
    shown = json.loads(run("decompress", compressed, "--out", tmp_path / "again", "--json"))
    assert shown["bytes"] > shown["bytes_before"]
    assert (tmp_path / "again" / "notes.txt").exists()
    assert load_file(tmp_path / "again" / "model.safetensors").keys() == load_file(dense / "model.safetensors").keys()
    for name, tensor in load_file(dense / "model.safetensors").items():
        assert torch.equal(load_file(tmp_path / "again" / "model.safetensors")[name], tensor)


def test_which_layers(dense, tmp_path):
    shown = json.loads(run("compress", dense, "--out", tmp_path, "--spec", "1:2:4", "--include", "*.mlp.*", "--json"))
    assert len(shown["layers"]) == 6
    assert set(shown["layers"].values()) == {"1:2:4"}
    failed = run("compress", dense, "--out", tmp_path / "x", "--spec", "16:2:8", code=1)
    assert "is not 16:2:8" in one_line(failed)
    assert not (tmp_path / "x").exists()


def test_what_is_compressed_or_dense_already(dense, compressed, tmp_path):
    assert "compressed already" in one_line(run("compress", compressed, "--out", tmp_path / "x", code=1))
    assert "holds no compressed weights" in one_line(run("decompress", dense, "--out", tmp_path / "x", code=1))
    assert "compressed already" in one_line(run("convert", compressed, "--out", tmp_path / "x", code=1))
    assert "is not empty" in one_line(run("decompress", compressed, "--out", dense, code=1))
    assert not (tmp_path / "x").exists()


def test_info(dense, compressed):
    shown = one_line(run("info", compressed))
    assert "format version 1" in shown
    assert "float32" in shown
    assert "model.layers.1.mlp.down_proj.weight" in run("info", compressed, "--layers")
    report = json.loads(run("info", compressed / "model.safetensors", "--json"))
    assert len(report["compressed"]) == LINEARS
    first = report["compressed"][0]
    assert first["bytes"] < first["dense_bytes"]
    assert "no compressed weights" in run("info", dense)
    assert json.loads(run("info", dense, "--json"))["format_version"] is None


def test_names_are_shown_on_one_line(tmp_path):
    model = torch.nn.ModuleDict({"two\nlines\x1b[31m": torch.nn.Linear(64, 32)})
    vnm.sparsify(model, "16:2:8", progress=False)
    vnm.compress_model(model)
    vnm.save(model, tmp_path / "model")
    assert r"  two\nlines\x1b[31m.weight  32 x 64  16:2:8" in run("info", tmp_path / "model", "--layers")
    vnm.load(tmp_path / "model", model)


def test_info_of_a_damaged_file(compressed, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes((compressed / "model.safetensors").read_bytes()[:-10])
    assert "cannot be read as safetensors" in one_line(run("info", tmp_path, code=1))
    assert "is no file or directory" in one_line(run("info", tmp_path / "none", code=1))


def bitmask(weight: Tensor, *, structured: bool) -> dict[str, Tensor]:
    """A weight as compressed-tensors stored it: values whose bits are set, and the bits, the first one lowest."""
    kept = weight != 0
    if structured:  # two of four, whatever they are
        groups = weight.abs().view(-1, 4)
        kept = torch.zeros_like(groups, dtype=torch.bool).scatter_(1, groups.topk(2).indices, True).view_as(weight)
    padded = torch.nn.functional.pad(kept, (0, -kept.shape[1] % 8)).view(kept.shape[0], -1, 8)
    bits = (padded * torch.tensor([1, 2, 4, 8, 16, 32, 64, 128])).sum(-1).to(torch.uint8)
    values = weight[kept]
    shape = torch.tensor(weight.shape)
    if structured:
        return {"compressed": values.view(weight.shape[0], -1), "bitmask": bits, "shape": shape.view(2, 1)}
    return {"compressed": values, "bitmask": bits, "shape": shape, "row_offsets": torch.zeros(len(weight)).long()}


def stranded(dense: Path, folder: Path, *, structured: bool) -> Path:
    """A directory as compressed-tensors wrote it."""
    folder.mkdir()
    tensors: dict[str, Tensor] = {}
    for name, tensor in load_file(dense / "model.safetensors").items():
        if name.endswith("_proj.weight"):
            prefix = name.removesuffix(".weight") if structured else name
            tensors |= {f"{prefix}.{part}": value for part, value in bitmask(tensor, structured=structured).items()}
        else:
            tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((dense / "config.json").read_text())
    stored = "sparse-24-bitmask" if structured else "sparse-bitmask"
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "sparsity_config": {"format": stored, "sparsity_structure": "2:4"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("structured", [True, False])
def test_convert_bitmasks(dense, tmp_path, structured):
    source = stranded(dense, tmp_path / "stranded", structured=structured)
    shown = json.loads(run("convert", source, "--out", tmp_path / "out", "--json"))
    assert len(shown["layers"]) == LINEARS
    assert torch.equal(logits(tmp_path / "out"), logits(dense))
    named = run("convert", source, "--from", "sparse-24-bitmask", "--out", tmp_path / "named")
    assert "written to" in named


SPOILED = {
    "no bitmask": (lambda t: [t.pop(name) for name in list(t) if name.endswith("bitmask")], "no weight with a bitmask"),
    "no values": (lambda t: t.pop("model.layers.0.mlp.up_proj.compressed"), "not its compressed"),
    "fewer values": (
        lambda t: t.update({"model.layers.0.mlp.up_proj.compressed": torch.ones(3)}),
        "keeps 1024 values; it has 3",
    ),
    "shape": (lambda t: t.update({"model.layers.0.mlp.up_proj.shape": torch.tensor([64])}), "two dimensions"),
    "huge": (lambda t: t.update({"model.layers.0.mlp.up_proj.shape": torch.tensor([2**40, 64])}), "two dimensions"),
    "negative": (lambda t: t.update({"model.layers.0.mlp.up_proj.shape": torch.tensor([-64, 32])}), "two dimensions"),
    "bits": (lambda t: t.update({"model.layers.0.mlp.up_proj.bitmask": torch.ones(64, 3).byte()}), "its bitmask is"),
    "quantised": (
        lambda t: t.update({"model.layers.0.mlp.up_proj.compressed": torch.ones(64, 16).to(torch.float8_e4m3fn)}),
        "float8_e4m3fn, quantised",
    ),
    "twice": (lambda t: t.update({"model.layers.0.mlp.up_proj.weight": torch.ones(64, 32)}), "holds it twice"),
}


@pytest.mark.parametrize("change", SPOILED)
def test_spoiled_bitmasks(dense, tmp_path, change):
    source = stranded(dense, tmp_path / "stranded", structured=True)
    spoil, message = SPOILED[change]
    tensors = load_file(source / "model.safetensors")
    spoil(tensors)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    assert message in one_line(run("convert", source, "--out", tmp_path / "out", code=1))
    assert not (tmp_path / "out").exists()


def semi_structured(weight: Tensor) -> Tensor:
    from torch.sparse import SparseSemiStructuredTensorCUTLASS
    from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass

    values, metadata = sparse_semi_structured_from_dense_cutlass(weight)
    return SparseSemiStructuredTensorCUTLASS(
        weight.shape, packed=values, meta=metadata, packed_t=None, meta_t=None, compressed_swizzled_bitmask=None
    )


def test_convert_semi_structured_weights(dense, tmp_path):
    """What `torch.sparse.to_sparse_semi_structured` makes, in a state dict of torch.save."""
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=32, dtype=torch.float16, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).half()
    state = {}
    for i, (name, tensor) in enumerate(model.state_dict().items()):
        if name.endswith("_proj.weight"):
            tensor.copy_(random_sparse(*tensor.shape, "1:2:4", torch.float16, seed=i))
        state[name] = semi_structured(tensor) if name.endswith("_proj.weight") else tensor
    source = tmp_path / "source"
    source.mkdir()
    config.save_pretrained(source)
    torch.save(state, source / "pytorch_model.bin")
    shown = json.loads(run("convert", source, "--out", tmp_path / "out", "--json"))
    assert len(shown["layers"]) == 7
    loaded = vnm.load(tmp_path / "out", LlamaForCausalLM(config).half())
    for name, tensor in model.state_dict().items():
        found = loaded.state_dict()[name]
        assert torch.equal(found.to_dense() if isinstance(found, vnm.VNMTensor) else found, tensor), name


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("unpickled",))


def test_pickles_are_not_run(dense, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_bytes((dense / "config.json").read_bytes())
    torch.save({"model.norm.weight": Bomb()}, source / "pytorch_model.bin")
    shown = one_line(run("convert", source, "--from", "semi-structured", "--out", tmp_path / "out", code=1))
    assert "holds more than tensors" in shown


def test_convert_what_it_cannot(dense, tmp_path):
    assert "there is no reader of 'gguf'" in one_line(
        run("convert", dense, "--from", "gguf", "--out", tmp_path / "x", code=1)
    )
    source = tmp_path / "quantised"
    source.mkdir()
    config = json.loads((dense / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    shown = one_line(run("convert", source, "--out", tmp_path / "x", code=1))
    assert "quantised (quant_method gptq)" in shown


def test_convert_dense_with_zeros(dense, tmp_path):
    run("convert", dense, "--out", tmp_path / "out")
    assert torch.equal(logits(tmp_path / "out"), logits(dense))


def test_prune_writes_compressed_unless_told_otherwise(dense, tmp_path):
    made = json.loads(run("prune", dense, "--spec", "16:2:8", "--out", tmp_path / "small", "--json"))
    run("prune", dense, "--spec", "16:2:8", "--out", tmp_path / "large", "--dense")
    assert made["bytes"] < made["bytes_before"]
    assert len(made["layers"]) == LINEARS
    assert "vnm_format" not in (tmp_path / "large" / "model.safetensors").read_bytes()[:5000].decode("latin1")
    assert torch.equal(logits(tmp_path / "small"), logits(tmp_path / "large"))
