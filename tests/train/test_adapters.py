"""Masks on peft's LoRA layers: the product with (W + BA) * mask, and exact, plain linears at the end."""

from __future__ import annotations

import copy
import warnings
from itertools import pairwise

import pytest
import torch
import transformers as hf
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import vnm_compile as vnm
from tests.support import make_sparse_
from tests.train.test_trainer import TINY, Data
from vnm_compile import train
from vnm_compile.errors import BadOption, NothingSelected, UnfinishedTraining, UnsupportedWeight
from vnm_compile.tensor import VNMTensor
from vnm_compile.train.masked import masked_layers

peft = pytest.importorskip("peft")
pytest.importorskip("accelerate")

SPEC = "16:2:8"
KINDS = {
    "LoRA": {},
    "rsLoRA": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "a bias": {"lora_bias": True},
    "dropout": {"lora_dropout": 0.3},
}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(24, 48), nn.Linear(48, 24)

    def forward(self, x):
        return self.down(F.gelu(self.up(x)))


def adapted(seed=0, module=Net, targets=("up", "down"), dtype=torch.float32, **options):
    """A model with LoRA layers whose adapters are not zero any more."""
    torch.manual_seed(seed)
    model = module().to(dtype)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=list(targets), **options)
    model = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape))
    return model


def fit(model, training, steps, x=None):
    x = torch.randn(8, 24) if x is None else x
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        F.mse_loss(model(x), x).backward()
        optimizer.step()
        training.step()


@pytest.mark.parametrize("kind", KINDS)
def test_without_masks_it_is_peft(kind):
    """The first stage is dense LoRA: values and gradients are peft's."""
    model = adapted(dtype=torch.float64, **KINDS[kind]).double()
    other = copy.deepcopy(model)
    train.begin(model, SPEC, steps=100)
    x = torch.randn(5, 24, dtype=torch.float64)
    results = []
    for each in (model, other):
        torch.manual_seed(3)  # of the dropout
        given = x.clone().requires_grad_()
        y = each(given)
        y.square().sum().backward()
        results.append([y, given.grad, *(p.grad for p in each.parameters() if p.requires_grad)])
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", ["LoRA", "rsLoRA", "a bias", "dropout"])
def test_masked_it_is_the_masked_sum(kind):
    model = adapted(dtype=torch.float64, targets=["up"], **KINDS[kind]).double().eval()
    layer = model.base_model.model.up
    training = train.begin(model, SPEC, train.ThreeStagedLoRA(dense=0, fixed=0.5), steps=10)
    (masked,) = masked_layers(model)
    x = torch.randn(5, 24, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    (grad_x, grad_a, grad_b) = torch.autograd.grad(
        y.square().sum(), [x, layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    )
    a, b = (each["default"].weight.detach().requires_grad_() for each in (layer.lora_A, layer.lora_B))
    weight = torch.where(masked.masked.mask, layer.base_layer.weight + layer.scaling["default"] * (b @ a), 0)
    assert vnm.matches(weight.detach(), SPEC)
    bias = layer.base_layer.bias
    if kind == "a bias":
        bias = bias + layer.scaling["default"] * layer.lora_B["default"].bias
    expected = F.linear(x, weight, bias)
    torch.testing.assert_close(y, expected)
    grads = torch.autograd.grad(expected.square().sum(), [x, a, b])
    for mine, theirs in zip((grad_x, grad_a, grad_b), grads, strict=True):
        torch.testing.assert_close(mine, theirs)
    assert training.step_number == 0


@pytest.mark.parametrize("recipe", [None, train.MaskDecay(every=1), train.StructureDecay(), train.SRSTE()])
@pytest.mark.parametrize("kind", ["LoRA", "DoRA"])
def test_at_the_end_plain_exact_linears_are_left(kind, recipe):
    model = adapted(**KINDS[kind])
    training = train.begin(model, SPEC, recipe, steps=20)
    assert isinstance(training.recipe, train.ThreeStagedLoRA if recipe is None else type(recipe))
    frozen = model.base_model.model.up.base_layer.weight
    before = frozen.clone()
    fit(model, training, 20)
    assert torch.equal(frozen, before), "the base is frozen until the end"
    x = torch.randn(6, 24)
    expected = model.eval()(x)
    assert vnm.finalize(model) == ["base_model.model.up", "base_model.model.down"]
    assert torch.equal(model(x), expected)
    plain = model.merge_and_unload()
    assert type(plain) is Net
    assert type(plain.up) is nn.Linear
    assert plain.up.weight is frozen
    assert vnm.matches(plain.up.weight, SPEC)
    assert vnm.matches(plain.down.weight, SPEC)
    with torch.no_grad():
        compiled = torch.compile(plain, backend="vnm", options={"vnm.policy": "memory"})(x)
    torch.testing.assert_close(compiled, expected)
    assert vnm.compress_model(plain)


def test_masks_move_in_the_second_stage_only():
    model = adapted()
    training = train.begin(model, SPEC, train.ThreeStagedLoRA(dense=0.25, fixed=0.5, every=1), steps=20)
    masks = []
    for _ in range(20):
        fit(model, training, 1, torch.randn(8, 24))
        masks.append(torch.cat([layer.masked.mask.flatten() for layer in masked_layers(model)]))
    assert all(mask.all() for mask in masks[:4])
    assert all(mask.float().mean() == 0.25 for mask in masks[4:])
    assert any(not torch.equal(one, other) for one, other in pairwise(masks[4:11]))
    assert all(torch.equal(mask, masks[-1]) for mask in masks[10:])


def test_gpt2s_transposed_weights():
    torch.manual_seed(0)
    config = hf.GPT2Config(vocab_size=50, n_positions=16, n_embd=32, n_layer=1, n_head=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of peft, which sets fan_in_fan_out
        model = peft.get_peft_model(
            hf.GPT2LMHeadModel(config), peft.LoraConfig(r=4, target_modules=["c_attn", "c_fc", "c_proj"])
        )
    ids = torch.randint(50, (2, 7))
    dense = model.eval()(ids).logits
    training = train.begin(model, SPEC, steps=20)
    torch.testing.assert_close(model(ids).logits, dense)
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    training.follow(optimizer)
    for _ in range(20):
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    expected = model.eval()(ids).logits
    assert len(vnm.finalize(model)) == 4
    assert torch.equal(model(ids).logits, expected)
    block = model.merge_and_unload().transformer.h[0]
    assert all(vnm.matches(each.weight.t(), SPEC) for each in (block.attn.c_attn, block.mlp.c_fc, block.mlp.c_proj))


def test_a_half_precision_base_with_full_precision_adapters():
    model = adapted(dtype=torch.bfloat16)
    assert model.base_model.model.up.lora_A["default"].weight.dtype == torch.float32
    training = train.begin(model, SPEC, steps=20)
    fit(model, training, 20, torch.randn(8, 24, dtype=torch.bfloat16))
    x = torch.randn(6, 24, dtype=torch.bfloat16)
    expected = model(x)
    assert expected.dtype == torch.bfloat16
    vnm.finalize(model)
    assert torch.equal(model(x), expected)
    assert vnm.matches(model.base_model.model.up.weight, SPEC)


def test_autocast_changes_no_mask():
    models = [adapted(), adapted()]
    for each, enabled in zip(models, (True, False), strict=True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            train.begin(each, SPEC, train.ThreeStagedLoRA(dense=0), steps=10)
            y = each(torch.randn(3, 24))
            assert y.dtype == (torch.bfloat16 if enabled else torch.float32)
            y.sum().backward()
    for one, other in zip(*map(masked_layers, models), strict=True):
        assert torch.equal(one.masked.mask, other.masked.mask)


def test_two_adapters_at_once():
    model = adapted(targets=["up"])
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["up"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "second"])
    x = torch.randn(3, 24)
    expected = model(x)
    train.begin(model, SPEC, steps=20)
    torch.testing.assert_close(model(x), expected)


def test_a_compressed_base():
    torch.manual_seed(0)
    net = Net()
    for layer in (net.up, net.down):
        make_sparse_(layer, SPEC)
    vnm.annotate(net, SPEC)
    vnm.compress_model(net)
    model = peft.get_peft_model(net, peft.LoraConfig(r=4, target_modules=["up", "down"], init_lora_weights=False))
    x = torch.randn(4, 24)
    dense = model(x)
    training = train.begin(model, SPEC, train.ThreeStagedLoRA(dense=0.1, fixed=0.5, every=2), steps=20)
    torch.testing.assert_close(model(x), dense)
    fit(model, training, 20)
    expected = model(x)
    vnm.finalize(model)
    plain = model.merge_and_unload()
    assert isinstance(plain.up.weight, VNMTensor)
    torch.testing.assert_close(plain(x), expected)


def test_fixed_masks_are_those_of_the_pruned_base():
    model = adapted()
    base = model.base_model.model
    for layer in (base.up.base_layer, base.down.base_layer):
        make_sparse_(layer, SPEC)
    masks = [layer.weight != 0 for layer in (base.up.base_layer, base.down.base_layer)]
    training = train.begin(model, None, train.FixedMask(), steps=5)
    fit(model, training, 5)
    vnm.finalize(model)
    for layer, mask in zip((base.up, base.down), masks, strict=True):
        assert not layer.weight[~mask].any()
        assert layer.weight[mask].all()


def test_no_weight_is_kept_for_the_backward():
    """Memory stays LoRA's: of the sum of weight and adapter nothing outlives its layer's forward."""
    model = adapted()
    train.begin(model, SPEC, train.ThreeStagedLoRA(dense=0), steps=10)
    own = {each.untyped_storage().data_ptr() for each in (*model.parameters(), *model.buffers())}
    kept = []

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            kept.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(torch.randn(3, 24)).sum()
    assert not any(shape.numel() >= 24 * 48 for shape in kept), kept


def test_without_adapters_it_is_the_model_as_loaded():
    model = adapted()
    x = torch.randn(3, 24)
    with model.disable_adapter():
        expected = model(x)
    train.begin(model, SPEC, train.ThreeStagedLoRA(dense=0), steps=10)
    masked = model(x)
    with model.disable_adapter():
        assert torch.equal(model(x), expected)
    assert torch.equal(model(x), masked), "and is masked again afterwards"


def test_masks_travel_with_the_adapter(tmp_path):
    model = adapted()
    training = train.begin(model, SPEC, train.ThreeStagedLoRA(dense=0.1, fixed=0.5, every=2), steps=20)
    fit(model, training, 12)
    x = torch.randn(3, 24)
    expected = model(x)
    model.save_pretrained(tmp_path)
    again = adapted()
    other = train.begin(again, SPEC, train.ThreeStagedLoRA(dense=0.1, fixed=0.5, every=2), steps=20)
    again.load_adapter(str(tmp_path), "default", is_trainable=True)
    other.load_state_dict(training.state_dict())
    torch.testing.assert_close(again(x), expected)
    torch.manual_seed(5)
    fit(model, training, 8)
    torch.manual_seed(5)
    fit(again, other, 8)
    for one, two in zip(masked_layers(model), masked_layers(again), strict=True):
        assert torch.equal(one.masked.mask, two.masked.mask)
    third = adapted()
    train.begin(third, SPEC, train.MaskDecay(), steps=20)
    with pytest.raises(BadOption, match="another recipe"):
        third.load_adapter(str(tmp_path), "default")


def trainer(folder):
    torch.manual_seed(0)
    model = hf.BertForSequenceClassification(hf.BertConfig(**TINY))
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["query", "value", "dense"]))
    arguments = hf.TrainingArguments(
        str(folder), max_steps=8, per_device_train_batch_size=4, save_steps=4, report_to=[], use_cpu=True,
        learning_rate=1e-2, logging_steps=1000, disable_tqdm=True,
    )  # fmt: skip
    callback = train.MaskCallback(SPEC, train.ThreeStagedLoRA(dense=0.1, fixed=0.5, every=1))
    return hf.Trainer(model, arguments, train_dataset=Data(), callbacks=[callback]), callback


def test_in_a_trainer_and_on_from_its_checkpoint(tmp_path):
    whole, _ = trainer(tmp_path)
    whole.train()
    plain = whole.model.merge_and_unload()
    assert vnm.matches(plain.bert.encoder.layer[0].intermediate.dense.weight, SPEC)
    again, callback = trainer(tmp_path)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert callback.training.step_number == 8
    for one, other in zip(plain.parameters(), again.model.merge_and_unload().parameters(), strict=True):
        assert torch.equal(one, other)


def test_compiled_it_trains_alike():
    model = adapted()
    train.begin(model, SPEC, train.ThreeStagedLoRA(dense=0), steps=10)
    x = torch.randn(4, 24)
    results = []
    for call in (model, torch.compile(model, backend="vnm")):
        model.zero_grad()
        y = call(x)
        y.square().sum().backward()
        results.append([y.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


def test_what_is_refused_leaves_the_model_as_it_was():
    def refused(model, match, error=UnsupportedWeight, **given):
        x = torch.randn(2, 24)
        expected = model.eval()(x)
        with pytest.raises(error, match=match):
            train.begin(model, SPEC, **{"steps": 20, **given})
        assert not masked_layers(model)
        assert torch.equal(model(x), expected)

    merged = adapted()
    merged.merge_adapter()
    refused(merged, "unmerge_adapter")
    refused(adapted(use_dora=True, lora_dropout=0.1), "lora_dropout")
    refused(adapted(lora_dropout=0.1), "SRSTE", recipe=train.SRSTE())
    refused(adapted(), "frozen", BadOption, recipe=train.SRSTE(decoupled=True), optimizer=None)
    refused(adapted(), "too few|leave", BadOption, recipe=train.StructureDecay(dense=0.5), steps=2)
    refused(adapted(targets=["up"]), "down.*no LoRA layer", include=["*up*", "*down*"])
    refused(Net(), "peft", NothingSelected, recipe=train.ThreeStagedLoRA())
    hooked = adapted()
    hooked.base_model.model.up.base_layer.register_forward_hook(lambda module, given, y: y + 1)
    refused(hooked, "hooks")
    model = adapted()
    with torch.no_grad():
        model.base_model.model.up.base_layer.weight[3, 3] = float("nan")
    with pytest.raises(vnm.VNMError, match="NaN"):
        train.begin(model, SPEC, train.ThreeStagedLoRA(dense=0), steps=20)
    assert not masked_layers(model)


def test_while_it_trains():
    model = adapted()
    train.begin(model, SPEC, steps=20)
    with pytest.raises(UnfinishedTraining):
        vnm.finalize(model)
    for merge in (model.merge_adapter, copy.deepcopy(model).merge_and_unload):
        with pytest.raises(UnsupportedWeight, match="finalize"):
            merge()
    with pytest.raises(UnsupportedWeight, match="already"):
        train.begin(model, SPEC, steps=20)
    with pytest.raises(BadOption, match="adapter_names"):
        model.eval()(torch.randn(2, 24), adapter_names=["default", "default"])
    assert len(vnm.finalize(model, now=True)) == 2


def test_linears_without_adapters_are_left_alone():
    model = adapted(targets=["up"])
    train.begin(model, SPEC, steps=20)
    assert [layer.name for layer in masked_layers(model)] == ["base_model.model.up"]


@pytest.mark.parametrize("reentrant", [False, True])
def test_inside_of_checkpointed_blocks(reentrant):
    model, twin = adapted(), adapted()
    for each in (model, twin):
        train.begin(each, SPEC, train.ThreeStagedLoRA(dense=0), steps=10)
    x = torch.randn(3, 24, requires_grad=True)
    results = []
    for each, call in ((model, model), (twin, lambda x: checkpoint(twin, x, use_reentrant=reentrant))):
        call(x).square().sum().backward()
        results.append([p.grad for p in each.parameters() if p.requires_grad])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)
    with torch.inference_mode():
        evaluated = model(x)
    torch.testing.assert_close(evaluated, model(x).detach())


def test_a_layer_in_two_places_becomes_ordinary_in_both():
    class Twice(Net):
        def __init__(self):
            super().__init__()
            self.again = self.up
            self.unseen = [self.up]

        def forward(self, x):
            return self.down(F.gelu(self.up(x) + self.again(x) + self.unseen[0](x)))

    model = adapted(module=Twice)
    net = model.base_model.model
    net.again, net.unseen = net.up, [net.up]  # peft itself replaces the first place only
    training = train.begin(model, SPEC, steps=20)
    fit(model, training, 20)
    x = torch.randn(3, 24)
    expected = model.eval()(x)
    vnm.finalize(model)
    assert type(net.again) is nn.Linear
    torch.testing.assert_close(model(x), expected)
