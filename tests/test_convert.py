"""Compressed weights: right in eager mode, saved and loaded, and really smaller."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2Model, LlamaConfig, LlamaForCausalLM

from tests.support import make_sparse_, random_sparse
from vnm_compile import VNMError, VNMTensor, annotate, compress, compress_model, decompress_model, sparsify


def model():
    return make_sparse_(nn.Sequential(nn.Linear(48, 64), nn.GELU(), nn.Linear(64, 40)), "16:2:8").eval()


def test_eager_equals_dense_and_back():
    dense = model()
    x = torch.randn(3, 48)
    expected = dense(x)
    compressed = copy.deepcopy(dense)
    assert compress_model(compressed) == ["0", "2"]
    assert isinstance(compressed[0].weight, VNMTensor)
    assert isinstance(compressed[0].weight, nn.Parameter)
    assert torch.equal(compressed(x), expected)
    assert decompress_model(compressed) == ["0", "2"]
    for one, other in zip(compressed.parameters(), dense.parameters(), strict=True):
        assert torch.equal(one, other)


def test_what_was_annotated_by_name_is_compressed_too():
    """An output head, and a layer smaller than a block: left out unless they are named, and once they were, not."""
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    dense = LlamaForCausalLM(config)
    assert "lm_head" not in sparsify(dense, "16:2:8").to_dict()["layers"][0]["name"]
    sparsify(dense, "16:2:8", include=["lm_head"])
    small = nn.Sequential(nn.Linear(48, 8))
    sparsify(small, "16:2:8", include=["0"])
    assert "lm_head" in compress_model(copy.deepcopy(dense))
    assert "lm_head" not in compress_model(copy.deepcopy(dense), exclude=["lm_head"])
    assert compress_model(small) == ["0"]


def test_gradients_reach_the_input_and_the_bias():
    dense, x = model(), torch.randn(3, 48)
    compressed = copy.deepcopy(dense)
    compress_model(compressed)
    grads = []
    for each in (dense, compressed):
        leaf = x.clone().requires_grad_()
        each(leaf).square().sum().backward()
        grads.append((leaf.grad, each[2].bias.grad))
    torch.testing.assert_close(grads[1], grads[0])


def test_state_dict_round_trips():
    one, other, x = model(), model(), torch.randn(3, 48)
    make_sparse_(other, "16:2:8", seed=7)
    expected, dense_state = one(x), copy.deepcopy(one.state_dict())
    compress_model(one)
    file = io.BytesIO()
    torch.save(one.state_dict(), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    fresh = copy.deepcopy(other)
    compress_model(fresh)
    fresh.load_state_dict(loaded)
    assert torch.equal(fresh(x), expected)
    # A dense state into a compressed model, and a compressed one into a dense model.
    compress_model(other)
    other.load_state_dict(dense_state)
    assert torch.equal(other(x), expected)
    plain = model()
    plain.load_state_dict(loaded)
    assert torch.equal(plain(x), expected)


def test_loading_what_does_not_fit_is_an_error():
    compressed = model()
    compress_model(compressed)
    with pytest.raises(VNMError, match="is not 16:2:8"):
        compressed[0].weight.data.copy_(torch.randn(64, 48))
    with pytest.raises(VNMError, match="cannot be copied"):
        compressed[0].weight.data.copy_(compress(random_sparse(64, 48, "32:2:8", seed=3), "32:2:8"))


def test_moves_casts_and_copies():
    weight = compress(random_sparse(64, 48, "16:2:8"), "16:2:8")
    assert weight.to(torch.bfloat16).values.dtype == torch.bfloat16
    assert weight.to(torch.bfloat16).metadata.dtype == torch.uint8
    assert torch.equal(weight.double().to_dense(), weight.to_dense().double())
    assert torch.equal(weight.clone().to_dense(), weight.to_dense())
    assert copy.deepcopy(weight).values.data_ptr() != weight.values.data_ptr()
    assert weight.t().shape == (48, 64)
    assert torch.equal(weight.t().to_dense(), weight.to_dense().t())
    assert "16:2:8" in repr(weight)


def test_other_ops_see_the_dense_weight_and_writes_are_refused():
    weight = compress(random_sparse(64, 48, "16:2:8"), "16:2:8")
    assert torch.equal(weight.abs().sum(0), weight.to_dense().abs().sum(0))
    assert torch.equal(weight[3], weight.to_dense()[3])
    with pytest.raises(VNMError, match="decompress_model"):
        weight.mul_(2)


def test_conv1d_of_gpt2():
    config = GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=50, bos_token_id=0, eos_token_id=0)
    gpt2 = GPT2Model(config).eval()
    with torch.no_grad():
        for name, parameter in gpt2.named_parameters():
            if ".c_" in name and parameter.dim() == 2:
                parameter.copy_(random_sparse(*reversed(parameter.shape), "16:2:8").t() * 0.1)
        tokens = torch.arange(7)[None]
        expected = gpt2(tokens).last_hidden_state
        assert len(compress_model(gpt2, "16:2:8")) == 4
        torch.testing.assert_close(gpt2(tokens).last_hidden_state, expected)


def test_all_or_none():
    mixed = model()
    annotate(mixed, "16:2:8")
    with torch.no_grad():
        mixed[2].weight.copy_(torch.randn(40, 64))
    with pytest.raises(VNMError, match=r"^2: weight \[40, 64\] is not 16:2:8"):
        compress_model(mixed)
    assert not isinstance(mixed[0].weight, VNMTensor)
    with pytest.raises(VNMError, match="no linear layer of the model follows"):
        compress_model(nn.Sequential(nn.Linear(64, 64)))


@pytest.mark.parametrize("backend", ["vnm", "inductor"])
def test_compiled(backend):
    dense = model()
    compressed = copy.deepcopy(dense)
    compress_model(compressed)
    compiled = torch.compile(compressed, backend=backend, dynamic=True, fullgraph=True)
    with torch.no_grad():
        for tokens in (3, 5):
            x = torch.randn(tokens, 48)
            torch.testing.assert_close(compiled(x), dense(x))


@pytest.mark.slow
def test_memory_really_falls():
    """Measured where users measure it: resident memory of the process, and the bytes of the parameters."""
    script = """
        import psutil, torch
        from torch import nn
        import vnm_compile as vnm
        import vnm_compile.backend  # Inductor, which looking for patterns brings along, is not the model's memory
        from tests.support import random_sparse
        layers = nn.Sequential(*(nn.Linear(2048, 2048, bias=False) for _ in range(16)))
        with torch.no_grad():
            weight = random_sparse(2048, 2048, "64:2:8")
            for layer in layers:
                layer.weight.copy_(weight)
        del weight
        process = psutil.Process()
        before, dense = process.memory_info().rss, sum(p.nbytes for p in layers.parameters())
        vnm.compress_model(layers)
        after, packed = process.memory_info().rss, sum(p.nbytes for p in layers.parameters())
        print(before - after, dense - packed, packed / dense)
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True
    ).stdout.split()
    fallen, saved, share = int(result[0]), int(result[1]), float(result[2])
    assert share < 0.28
    assert fallen > 0.8 * saved
