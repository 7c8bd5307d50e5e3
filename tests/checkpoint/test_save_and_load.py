"""Models written by `vnm.save` and read by `vnm.load`: equal to the bit, as small as the format, all or nothing."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from transformers.pytorch_utils import Conv1D

import vnm_compile as vnm
from tests.support import make_sparse_, random_sparse
from vnm_compile.layout import Layout


def network(spec: str = "16:2:8", dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(48, 70), nn.GELU(), nn.BatchNorm1d(70), nn.Linear(70, 40, bias=False)).to(dtype)
    return make_sparse_(model, spec, seed).eval()


def compressed(spec: str = "16:2:8", *arguments) -> nn.Sequential:
    model = network(spec, *arguments)
    vnm.compress_model(model, spec)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("spec", ["16:2:8", "1:1:4", "8:2:5", "32:1:40"])
@pytest.mark.parametrize("meta", [False, True])
def test_round_trip(tmp_path, spec, dtype, meta):
    model, x = compressed(spec, dtype), torch.randn(3, 48, dtype=dtype)
    assert vnm.save(model, tmp_path / "model") == tmp_path / "model"
    other = network(spec, dtype, 1)
    other = other.to("meta") if meta else other
    assert vnm.load(tmp_path / "model", other) is other
    assert torch.equal(other(x), model(x))
    assert isinstance(other[0].weight, vnm.VNMTensor)
    assert isinstance(other[0].weight, nn.Parameter)
    assert not other[0].weight.requires_grad
    assert other[0].bias.requires_grad
    assert {str(layer.spec) for layer in vnm.explain(other).layers} == {spec}
    vnm.save(other, tmp_path / "again")
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["model.safetensors"]
    first, second = (tmp_path / name / "model.safetensors" for name in ("model", "again"))
    assert first.read_bytes() == second.read_bytes()


def test_names_header_and_size(tmp_path):
    model = compressed("16:2:8", torch.bfloat16)
    vnm.save(model, tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    tensors = load_file(path)
    arrays = {f"{i}.weight{part}" for i in (0, 3) for part in ("", ".vnm_values", ".vnm_metadata", ".vnm_columns")}
    dense = set(model.state_dict()) - {"0.weight", "3.weight"}
    assert set(tensors) == arrays | dense
    for name in ("values", "metadata", "columns"):
        assert torch.equal(tensors[f"0.weight.vnm_{name}"], getattr(model[0].weight, name))
    with safe_open(path, "pt") as file:
        assert file.metadata() == {
            "format": "pt",
            "vnm_format": "1",
            "vnm_weights": '{"0.weight":"16:2:8 70x48","3.weight":"16:2:8 40x70"}',
        }
    header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    sizes = sum(Layout(vnm.Spec(16, 2, 8), o, k).nbytes(torch.bfloat16) for o, k in ((70, 48), (40, 70)))
    rest = sum(t.numel() * t.element_size() for name, t in model.state_dict().items() if name in dense)
    assert path.stat().st_size == header + sizes + rest


def test_a_dense_reader_stops_at_a_compressed_weight(tmp_path):
    """It finds a tensor of another shape: a missing one might be left random."""
    vnm.save(compressed(), tmp_path / "model")
    with pytest.raises(RuntimeError, match=r"size mismatch for 0\.weight"):
        network().load_state_dict(load_file(tmp_path / "model" / "model.safetensors"), strict=False)


def test_integers_are_not_made_of_floats(tmp_path):
    """As copying would, without a word."""
    vnm.save(network(), tmp_path / "model")
    model = network()
    model[2].num_batches_tracked = torch.tensor(1.5)
    with pytest.raises(vnm.VNMError, match=r"2\.num_batches_tracked: .* holds I64, the model's is torch.float32"):
        vnm.load(tmp_path / "model", model)
    model = network()
    model[0].bias = nn.Parameter(torch.zeros(70, dtype=torch.int64), requires_grad=False)
    with pytest.raises(vnm.VNMError, match=r"0\.bias: .* holds float32, the model's is torch.int64"):
        vnm.load(tmp_path / "model", model)


def test_tensors_of_any_layout_and_dtype(tmp_path):
    """Views, expanded and transposed ones, negated ones, one-byte floats; also as what is loaded into."""
    base, model = torch.randn(100), nn.Module()
    model.p = nn.Parameter(torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last))
    tensors = {
        "view": base[10:30],
        "expanded": torch.randn(3, 1).expand(3, 4),
        "transposed": torch.randn(3, 4).t(),
        "flags": torch.tensor([True, False]),
        "number": torch.tensor(3),
        "negated": torch.randn(3, dtype=torch.cfloat).conj().imag,
        "complex": torch.randn(3, dtype=torch.cfloat).conj(),
        "empty": torch.empty(0, 3),
        "small": torch.randn(4).to(torch.float8_e4m3fn),
    }
    for name, tensor in tensors.items():
        model.register_buffer(name, tensor)
    vnm.save(model, tmp_path / "model")
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name in ("view", "transposed", "negated", "small", "p"):
        getattr(model, name).data.zero_()
    model.expanded = torch.zeros(3, 1).expand(3, 4)
    with torch.inference_mode():
        model.number = torch.tensor(0)
    vnm.load(tmp_path / "model", model)
    for name, tensor in expected.items():
        found = model.state_dict()[name]
        assert found.dtype == tensor.dtype
        assert torch.equal(found.to(torch.cfloat), tensor.to(torch.cfloat)), name
    assert torch.equal(base[10:30], expected["view"]), "what can be written to stays the tensor that it is"


def test_a_model_made_under_inference_mode(tmp_path):
    vnm.save(compressed(), tmp_path / "model")
    with torch.inference_mode():
        model = network(seed=1)
    vnm.load(tmp_path / "model", model)
    x = torch.randn(3, 48, requires_grad=True)
    assert torch.equal(model(x), compressed()(x))
    model(x).sum().backward()


def test_places_that_cannot_be_filled_leave_the_model_as_it_is(tmp_path):
    vnm.save(compressed(), tmp_path / "model")
    lazy = nn.Sequential(*network(seed=1)[:3], nn.LazyLinear(40, bias=False))
    other = network(seed=1)
    other[0].bias = nn.Parameter(vnm.compress(torch.zeros(70, 4), "1:2:4").detach(), requires_grad=False)
    for model in (lazy, other):
        before = model[0].weight
        with pytest.raises(vnm.VNMError):
            vnm.load(tmp_path / "model", model)
        assert model[0].weight is before


def test_buffers_that_no_file_holds(tmp_path):
    """On the meta device they would stay there, and the model fail at its first call."""
    model = network()
    model[0].register_buffer("scale", torch.ones(3), persistent=False)
    vnm.save(model, tmp_path / "model")
    with pytest.raises(vnm.VNMError, match=r"0\.scale: a buffer that no file holds, on the meta device"):
        vnm.load(tmp_path / "model", copy.deepcopy(model).to("meta"))
    vnm.load(tmp_path / "model", model)


def test_many_columns_take_two_bytes(tmp_path):
    model = nn.Sequential(nn.Linear(700, 32))
    model[0].weight.data = random_sparse(32, 700, "16:2:300")
    vnm.compress_model(model, "16:2:300")
    vnm.save(model, tmp_path / "model")
    assert load_file(tmp_path / "model" / "model.safetensors")["0.weight.vnm_columns"].dtype == torch.uint16
    other = vnm.load(tmp_path / "model", nn.Sequential(nn.Linear(700, 32)))
    assert torch.equal(other[0].weight.to_dense(), model[0].weight.to_dense())


def test_weights_that_are_stored_the_other_way_round(tmp_path):
    model = nn.Sequential(Conv1D(48, 48))
    model[0].weight.data = random_sparse(48, 48, "16:2:8").t()
    vnm.compress_model(model)
    vnm.save(model, tmp_path / "model")
    other = vnm.load(tmp_path / "model", nn.Sequential(Conv1D(48, 48)))
    assert torch.equal(other[0].weight.to_dense(), model[0].weight.to_dense())
    x = torch.randn(2, 48)
    assert torch.equal(other(x), model(x))
    with pytest.raises(vnm.VNMError, match="transposed"):
        vnm.load(tmp_path / "model", nn.Sequential(nn.Linear(48, 48)))


def test_loading_takes_dtype_of_the_model(tmp_path):
    model = compressed()
    vnm.save(model, tmp_path / "model")
    other = vnm.load(tmp_path / "model", network().to(torch.bfloat16))
    assert other[0].weight.dtype == other[3].weight.dtype == other[0].bias.dtype == torch.bfloat16
    assert torch.equal(other[0].weight.to_dense(), model[0].weight.to_dense().bfloat16())


def test_dense_models_and_compressed_ones_meet(tmp_path):
    """A dense file into a compressed model makes it dense there, and the other way round."""
    vnm.save(network(), tmp_path / "dense")
    model = vnm.load(tmp_path / "dense", compressed("16:2:8", torch.float32, 3))
    assert type(model[0].weight) is nn.Parameter
    assert torch.equal(model[0].weight, network()[0].weight)
    vnm.save(compressed(), tmp_path / "sparse")
    assert isinstance(vnm.load(tmp_path / "sparse", model)[0].weight, vnm.VNMTensor)


def test_shards(tmp_path):
    model = compressed()
    vnm.save(model, tmp_path / "model", max_shard_size="2.5 KB")
    folder = tmp_path / "model"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert set(index["weight_map"].values()) == set(files)
    assert len({file for name, file in index["weight_map"].items() if name.startswith("0.weight")}) == 1
    other = vnm.load(folder, network(seed=1))
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(torch.as_tensor(one.detach().tolist()), torch.as_tensor(two.detach().tolist()))


def test_tied_weights_are_stored_once_and_stay_tied(tmp_path):
    def tied() -> nn.ModuleDict:
        model = nn.ModuleDict({"embedding": nn.Embedding(30, 48), "body": nn.Linear(48, 48), "head": nn.Linear(48, 30)})
        model["head"].weight = model["embedding"].weight
        make_sparse_(model["body"], "16:2:8")
        return model

    model = tied()
    vnm.compress_model(model)
    vnm.save(model, tmp_path / "model")
    assert "head.weight" not in load_file(tmp_path / "model" / "model.safetensors")
    with torch.device("meta"):
        empty = tied()
    empty["head"].weight = empty["embedding"].weight
    for other in (tied(), empty):
        vnm.load(tmp_path / "model", other)
        assert other["head"].weight is other["embedding"].weight
        assert torch.equal(other["head"].weight, model["embedding"].weight)


def test_parameters_over_one_memory(tmp_path):
    """Flat buffers, views: every tensor is stored with its own values."""
    flat = torch.randn(80)
    model = nn.ParameterDict({"a": nn.Parameter(flat[:48]), "b": nn.Parameter(flat[40:]), "c": flat.view(8, 10).t()})
    vnm.save(model, tmp_path / "model")
    stored = load_file(tmp_path / "model" / "model.safetensors")
    assert all(torch.equal(stored[name], tensor) for name, tensor in model.state_dict().items())


def test_compiled_models(tmp_path):
    model = compressed()
    vnm.save(torch.compile(model, backend="vnm"), tmp_path / "model")
    other = network(seed=1)
    vnm.load(tmp_path / "model", torch.compile(other, backend="vnm"))
    assert torch.equal(other[0].weight.to_dense(), model[0].weight.to_dense())


def test_a_compiled_model_runs_what_was_loaded(tmp_path):
    vnm.save(compressed("16:2:8", torch.float32, 5), tmp_path / "model")
    model, x = compressed(), torch.randn(3, 48)
    run = torch.compile(model, backend="vnm")
    with torch.no_grad():
        run(x)
        vnm.load(tmp_path / "model", model)
        torch.testing.assert_close(run(x), compressed("16:2:8", torch.float32, 5)(x))


def test_what_was_loaded_does_not_follow_the_file(tmp_path):
    model = compressed()
    vnm.save(model, tmp_path / "model")
    with torch.device("meta"):
        other = nn.Sequential(nn.Linear(48, 70), nn.GELU(), nn.BatchNorm1d(70), nn.Linear(70, 40, bias=False))
    vnm.load(tmp_path / "model", other.eval())
    path, x = tmp_path / "model" / "model.safetensors", torch.randn(3, 48)
    with path.open("r+b") as file:
        file.seek(1000)
        file.write(b"\1" * 20000)
    assert torch.equal(other(x), model(x))


def test_saving_over_the_directory_that_it_was_loaded_from(tmp_path):
    model = compressed()
    vnm.save(model, tmp_path / "model")
    (tmp_path / "model" / "notes.txt").write_text("kept")
    (tmp_path / "model" / "model-00001-of-00002.safetensors").write_bytes(b"of an older model")
    vnm.load(tmp_path / "model", model)
    before = (tmp_path / "model" / "model.safetensors").read_bytes()
    with pytest.raises(vnm.VNMError, match="overwrite=True"):
        vnm.save(model, tmp_path / "model")
    vnm.save(model, tmp_path / "model", overwrite=True)
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == before
    assert {path.name for path in (tmp_path / "model").iterdir()} == {"model.safetensors", "notes.txt"}
    assert list(tmp_path.iterdir()) == [tmp_path / "model"]


def test_a_full_disk_and_an_interruption_leave_nothing(tmp_path, monkeypatch):
    model = compressed()
    import safetensors.torch

    vnm.save(model, tmp_path / "model")
    before = (tmp_path / "model" / "model.safetensors").read_bytes()
    for error, expected in ((OSError(28, "No space left on device"), vnm.VNMError), (KeyboardInterrupt(), None)):

        def fails(tensors, path, metadata, error=error):
            Path(path).write_bytes(b"half")
            raise error

        monkeypatch.setattr(safetensors.torch, "save_file", fails)
        with pytest.raises(expected or KeyboardInterrupt):
            vnm.save(model, tmp_path / "model", overwrite=True)
        with pytest.raises(expected or KeyboardInterrupt):
            vnm.save(model, tmp_path / "made" / "for" / "it")
        assert list(tmp_path.iterdir()) == [tmp_path / "model"]
        assert (tmp_path / "model" / "model.safetensors").read_bytes() == before


def _with(model: nn.Module, **changes: object) -> nn.Module:
    for name, value in changes.items():
        setattr(model, name, value)
    return model


class _ExtraState(nn.Linear):
    def get_extra_state(self):
        return {"any": "thing"}

    def set_extra_state(self, state):
        pass


BAD_SAVES = [
    (lambda: "model", {}, "the model is a str"),
    (lambda: network().to("meta"), {}, "0.weight: it has no values here"),
    (lambda: _ExtraState(4, 4), {}, "_extra_state: the state dict holds a dict"),
    (lambda: _with(nn.Module(), w=nn.Parameter(torch.eye(4).to_sparse())), {}, "w: a torch.sparse_coo"),
    (network, {"max_shard_size": "much"}, "max_shard_size='much'"),
    (network, {"max_shard_size": 0}, "max_shard_size=0"),
    (network, {"max_shard_size": True}, "max_shard_size=True"),
]


@pytest.mark.parametrize(("make", "options", "message"), BAD_SAVES, ids=[message for *_, message in BAD_SAVES])
def test_what_cannot_be_saved(tmp_path, make, options, message):
    with pytest.raises(vnm.VNMError, match=message.replace("(", r"\(")):
        vnm.save(make(), tmp_path / "model", **options)
    assert not list(tmp_path.iterdir())


def test_where_nothing_can_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(vnm.VNMError, match="is a file"):
        vnm.save(network(), tmp_path / "file")
    with pytest.raises(vnm.VNMError, match="is a file"):
        vnm.save(network(), tmp_path / "file" / "below")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: nn.Sequential(nn.Linear(48, 70)), "no place for: 2.bias, 2.num_batches_tracked, 2.running_mean and"),
        (lambda: nn.Sequential(*network(), nn.Linear(40, 4)), "does not hold all of the model's weights: 4.bias"),
        (lambda: nn.Sequential(nn.Linear(48, 71), *network()[1:]), "0.bias: .* holds .70., the model's is .71."),
        (lambda: nn.Sequential(nn.Linear(49, 70), *network()[1:]), "holds 16:2:8 70x48, the model's weight is .70, 49"),
        (
            lambda: nn.Sequential(nn.Conv1d(48, 70, 1), *network()[1:]),
            "0.weight: it is compressed in the files, and in",
        ),
        (lambda: "model", "the model is a str"),
    ],
)
def test_a_model_that_does_not_fit_stays_as_it_is(tmp_path, model, message):
    vnm.save(compressed(), tmp_path / "model")
    made = model()
    before = copy.deepcopy(made.state_dict()) if isinstance(made, nn.Module) else {}
    with pytest.raises(vnm.VNMError, match=message):
        vnm.load(tmp_path / "model", made)
    for name, tensor in before.items():
        assert torch.equal(made.state_dict()[name], tensor)


def test_weights_that_are_shared_or_computed_are_refused(tmp_path):
    vnm.save(compressed(), tmp_path / "model")
    shared = network()
    shared.register_module("4", nn.Embedding(70, 48))
    shared[4].weight = shared[0].weight
    computed = network()
    torch.nn.utils.parametrizations.weight_norm(computed[0])
    for model in (shared, computed):
        with pytest.raises(vnm.VNMError):
            vnm.load(tmp_path / "model", model)


def test_other_writers_work_or_say_what_to_call(tmp_path):
    import accelerate
    import torch.distributed.checkpoint as dcp
    from safetensors.torch import load_model, save_file, save_model

    model = compressed()
    for write in (
        lambda: save_model(model, tmp_path / "a"),
        lambda: save_file(model.state_dict(), tmp_path / "b"),
        lambda: accelerate.Accelerator().save_model(model, tmp_path / "c"),
        lambda: (save_model(network(), tmp_path / "d"), load_model(model, tmp_path / "d")),
    ):
        with pytest.raises(vnm.VNMError, match=r"call vnm\.save\(model, directory\)"):
            write()
    dcp.save(model.state_dict(), checkpoint_id=tmp_path / "e")
    for other in (compressed("16:2:8", torch.float32, 3), network(seed=3)):
        state = other.state_dict()
        dcp.load(state, checkpoint_id=tmp_path / "e")
        other.load_state_dict(state)
        assert torch.equal(torch.tensor(other[0].weight.tolist()), torch.tensor(model[0].weight.tolist()))


def test_a_progress_bar_needs_a_terminal(tmp_path, capfd):
    vnm.save(network(), tmp_path / "model")
    vnm.load(tmp_path / "model", network())
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
def test_in_a_new_process(tmp_path):
    vnm.save(compressed(), tmp_path / "model")
    code = """
import sys, torch, vnm_compile as vnm
from tests.checkpoint.test_save_and_load import network
model = vnm.load(sys.argv[1], network(seed=4))
x = torch.ones(2, 48)
with torch.no_grad():
    compiled = torch.compile(model, backend="vnm", options={"vnm.policy": "memory"})(x)
    torch.testing.assert_close(compiled, model(x))
print(model(x).sum().item())
"""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    shown = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "model")], env=environment, capture_output=True, text=True
    )
    assert shown.returncode == 0, shown.stderr
    assert float(shown.stdout) == pytest.approx(compressed()(torch.ones(2, 48)).sum().item())
