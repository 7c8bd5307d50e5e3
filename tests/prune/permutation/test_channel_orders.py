"""Channel orders: which are found to be free, and that changing those changes no output."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

import vnm_compile as vnm
from vnm_compile.prune.calibration import run_model
from vnm_compile.prune.permutation import find_channel_orders

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = {"vocab_size": 60, "max_position_embeddings": 16}
TOKENS = {"input_ids": torch.arange(14).view(2, 7)}


def bert(attention="sdpa"):
    config = BertConfig(**SIZES, **TEXT, attn_implementation=attention)
    return BertModel(config, add_pooling_layer=False), TOKENS


def eager_bert():
    return bert("eager")


def llama():
    return LlamaForCausalLM(LlamaConfig(**SIZES, **TEXT, num_key_value_heads=2)), TOKENS


def gpt2():
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=60, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)
    ), TOKENS


def vit():
    pixels = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    return ViTForImageClassification(ViTConfig(**SIZES, image_size=16, patch_size=8)), {"pixel_values": pixels}


def torch_encoder():
    layer = nn.TransformerEncoderLayer(32, 4, 48, batch_first=True)
    return nn.TransformerEncoder(layer, 2), torch.randn(2, 7, 32, dtype=torch.float64)


class Residual(nn.Module):
    def __init__(self, between=nn.Identity, width=48):
        super().__init__()
        self.first, self.last = nn.Linear(12, 32), nn.Linear(32, 6)
        self.norm, self.up, self.down = nn.LayerNorm(32), nn.Linear(32, 48), nn.Linear(width, 32)
        self.between = between()

    def forward(self, x):
        x = self.first(x)
        x = x + self.down(self.between(torch.relu(self.up(self.norm(x)))))
        return self.last(x)


def residual():
    return Residual(), torch.randn(5, 12, dtype=torch.float64)


FREE = {  # a dimension that follows each free order, and the block in which channels may move
    bert: {"attention.self.query.weight[0]": 8, "attention.self.value.weight[0]": 8, "output.dense.weight[1]": None},
    eager_bert: {"attention.self.key.weight[0]": 8, "attention.output.dense.weight[1]": 8},
    llama: {
        "self_attn.v_proj.weight[0]": 8,
        "mlp.up_proj.weight[0]": 48,
        "mlp.down_proj.weight[1]": 48,
        "embed_tokens.weight[1]": 32,
        "mlp.gate_proj.weight[1]": 32,
    },
    gpt2: {"mlp.c_fc.weight[1]": 128, "mlp.c_proj.weight[0]": 128, "wte.weight[1]": 32, "mlp.c_proj.weight[1]": 32},
    vit: {
        "attention.v_proj.bias[0]": 8,
        "mlp.fc1.bias[0]": 48,
        "cls_token[2]": 32,
        "patch_embeddings.projection.weight[0]": 32,
    },
    torch_encoder: {"linear1.weight[0]": 48, "linear2.weight[1]": 48},
    residual: {"up.weight[0]": 48, "down.weight[1]": 48, "norm.bias[0]": 32, "last.weight[1]": 32},
}
PINNED = {  # a dimension of each order that is not free, and a word of the reason
    bert: {"output.LayerNorm.weight[0]": "output of the model", "word_embeddings.weight[0]": "embedding"},
    eager_bert: {"output.LayerNorm.bias[0]": "output of the model"},
    llama: {"self_attn.q_proj.weight[0]": "self_attn", "lm_head.weight[0]": "output of the model"},
    gpt2: {"attn.c_attn.weight[1]": "split", "wpe.weight[0]": "embedding"},
    vit: {"position_embeddings[1]": "embeddings", "classifier.bias[0]": "output of the model"},
    torch_encoder: {"self_attn.in_proj_weight[0]": "self_attn", "norm2.weight[0]": "depends on it"},
    residual: {"first.weight[1]": "depends on it", "last.weight[0]": "output of the model"},
}


def permuted(order, generator):
    """A random legal permutation of the channels."""
    starts = range(0, order.size, order.block)
    return torch.cat([start + torch.randperm(order.block, generator=generator) for start in starts])


def permute_all(model, batch):
    """Bring every free order into a random one; returns the orders and the largest relative change of an output."""
    model = model.double().eval()
    with torch.no_grad():
        before = tensors(run_model(model, batch))
        orders = find_channel_orders(model, batch)
        generator = torch.Generator().manual_seed(1)
        for order in orders.free:
            orders.apply(order, permuted(order, generator))
        after = tensors(run_model(model, batch))
    return orders, max(float((b - a).abs().max() / b.abs().max()) for b, a in zip(before, after, strict=True))


def tensors(output):
    if isinstance(output, torch.Tensor):
        return [output]
    return [output.last_hidden_state] if hasattr(output, "last_hidden_state") else [output.logits]


@pytest.mark.parametrize("build", FREE, ids=lambda build: build.__name__)
def test_free_orders_are_found_and_change_no_output(build):
    torch.manual_seed(0)
    orders, error = permute_all(*build())
    assert error < 1e-6  # some of these models compute their norms in fp32, whatever they are given
    by_place = {place: order for order in orders.orders for place in order.weights}
    for ending, block in FREE[build].items():
        found = [order for place, order in by_place.items() if place.endswith(ending)]
        assert found, ending
        assert all(order.reason is None or build is bert for order in found), orders.explain()
        assert block is None or {order.block for order in found} == {block}
    for ending, word in PINNED[build].items():
        found = [order for place, order in by_place.items() if place.endswith(ending)]
        assert found, ending
        assert all(word in (order.reason or "") for order in found), orders.explain()


def test_every_dimension_belongs_to_one_order_and_all_users_move_together():
    model, batch = llama()
    orders = find_channel_orders(model, batch)
    places = [place for order in orders.orders for place in order.weights]
    assert len(places) == len(set(places)) == sum(p.dim() for p in model.parameters())
    residual = next(order for order in orders.free if "model.embed_tokens.weight[1]" in order.weights)
    assert len(residual.places) == 2 + 2 * 9 + 1, "embedding, final norm; 7 linears and 2 norms a layer; head"
    heads = next(order for order in orders.free if "model.layers.0.self_attn.v_proj.weight[0]" in order.weights)
    _, dim, digits = next(place for place in heads.places if place[0].endswith("o_proj.weight"))
    assert dim == 1
    assert heads.positions(digits).shape == (16, 2), "every value channel is read by two query heads"


class Do(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def attention_over_heads(x):
    """Products that are sums over the heads, place by place in them."""
    x = x.view(1, 5, 6, 8).permute(0, 3, 1, 2)
    return nn.functional.scaled_dot_product_attention(x, x, x).permute(0, 2, 3, 1).reshape(5, 48)


class Scaled(nn.Module):
    """Multiplies by a constant of which no parameter is known."""

    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.linspace(1, 2, 48, dtype=torch.float64))

    def forward(self, x):
        return x * self.scale


@pytest.mark.parametrize(
    "between",
    [
        Scaled,
        lambda: nn.GroupNorm(4, 48),
        lambda: Do(lambda x: x.cumsum(-1)),
        lambda: Do(lambda x: x.roll(1, -1)),
        lambda: Do(lambda x: torch.cat([x[:, 24:], x[:, :24]], -1)),
        lambda: Do(lambda x: x.view(5, 6, 8).transpose(1, 2).reshape(5, 48)),
        lambda: Do(lambda x: x.view(5, 6, 8).softmax(1).reshape(5, 48)),
        lambda: Do(lambda x: x * x.view(5, 6, 8).sum(1).repeat(1, 6)),
        lambda: Do(lambda x: x * x.argmax(-1, keepdim=True)),
        lambda: Do(lambda x: x.sort(-1).values),
        lambda: Do(lambda x: x + x.flip(-1)),
        lambda: Do(lambda x: (x.unsqueeze(2) * x.unsqueeze(1)).sum(1)),
        lambda: Do(lambda x: (x.unsqueeze(2) - 2 * x.unsqueeze(1)).amax(1)),
        lambda: Do(lambda x: x.T.reshape(5, 48)),
        lambda: nn.Sequential(nn.Unflatten(-1, (6, 8)), nn.LayerNorm(8), nn.Flatten()),
        lambda: Do(lambda x: nn.functional.layer_norm(x.view(5, 6, 8).transpose(1, 2), [6]).transpose(1, 2).flatten(1)),
        lambda: Do(attention_over_heads),
        lambda: nn.Sequential(nn.Unflatten(-1, (6, 8)), nn.Linear(8, 8), nn.Flatten()),
    ],
)
def test_whatever_happens_to_the_channels_no_output_changes(between):
    torch.manual_seed(0)
    orders, error = permute_all(Residual(between), torch.randn(5, 12, dtype=torch.float64))
    assert error < 1e-12, orders.explain()
    stream = next(order for order in orders.orders if "norm.weight[0]" in order.weights)
    assert stream.reason is None, "the residual stream has nothing to do with it"


@pytest.mark.parametrize(
    ("between", "block"),
    [
        (lambda: nn.Dropout(0.1), 48),
        (lambda: Do(lambda x: x / x.norm(dim=-1, keepdim=True).detach()), None),
        (lambda: Do(lambda x: x * x.mean(-1, keepdim=True).sigmoid()), 48),
        (lambda: Do(lambda x: x.softmax(-1)), 48),
        (lambda: Do(lambda x: x.view(5, 6, 8).softmax(-1).flatten(1)), 8),
        (lambda: Do(lambda x: x.view(5, 6, 8).transpose(1, 2).contiguous().transpose(1, 2).reshape(5, 48)), 8),
        (lambda: Do(lambda x: torch.where(x > 0.1, x, -x).clamp(max=2)), 48),
    ],
)
def test_operations_that_do_not_mind_the_order_leave_it_free(between, block):
    torch.manual_seed(0)
    orders, error = permute_all(Residual(between), torch.randn(5, 12, dtype=torch.float64))
    assert error < 1e-12
    hidden = next(order for order in orders.orders if "up.weight[0]" in order.weights)
    if block is None:
        assert "linalg_vector_norm" in hidden.reason
    else:
        assert hidden.reason is None
        assert hidden.block == block


class Tied(nn.Module):
    """One weight, read in two directions."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(12, 32), nn.Linear(32, 5)
        self.weight = nn.Parameter(torch.randn(32, 32))

    def forward(self, x):
        x = self.first(x)
        return self.last(torch.relu(x @ self.weight) @ self.weight.T)


def test_a_weight_that_is_read_twice_moves_once():
    torch.manual_seed(0)
    orders, error = permute_all(Tied(), torch.randn(5, 12, dtype=torch.float64))
    assert error < 1e-12
    assert any("weight[1]" in order.weights for order in orders.free)


def test_illegal_permutations_are_refused():
    model, batch = bert()
    orders = find_channel_orders(model, batch)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    query = next(order for order in orders.free if order.block == 8)
    pinned = next(order for order in orders.orders if order.reason)
    with pytest.raises(vnm.VNMError, match="is not free: embedding"):
        orders.apply(pinned, torch.arange(pinned.size))
    for wrong in (torch.arange(31), torch.zeros(32, dtype=torch.int64), torch.arange(32) + 1):
        with pytest.raises(vnm.VNMError, match="not a permutation of the 32 channels"):
            orders.apply(query, wrong)
    with pytest.raises(vnm.VNMError, match="only change places inside blocks of 8"):
        orders.apply(query, torch.arange(32).flip(0))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_model_that_cannot_be_exported_is_an_error():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x):
            return self.fc(x) if x.sum() > 0 else x

    with pytest.raises(vnm.VNMError, match=r"cannot be exported.*Prune with permute=False"):
        find_channel_orders(Branches(), torch.randn(4, 8))


def test_parameters_that_the_inputs_did_not_reach_keep_their_width():
    class Two(Residual):
        def __init__(self):
            super().__init__()
            self.other = nn.Linear(48, 4)

        def forward(self, x, other=False):
            hidden = torch.relu(self.up(self.norm(self.first(x))))
            return self.other(hidden) if other else self.last(self.down(hidden))

    orders = find_channel_orders(Two(), torch.randn(5, 12))
    hidden = next(order for order in orders.orders if "up.weight[0]" in order.weights)
    assert "other.weight, which has as many, was not reached" in hidden.reason
