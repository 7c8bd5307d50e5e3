"""Bad input: each row of a table gets a VNMError (or a TypeError) that says what is wrong, and no model is changed."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import vnm_compile as vnm
from tests.support import make_sparse_, random_sparse
from vnm_compile import Spec, VNMError, VNMTensor

Build = Callable[[], Any]
ROWS: list[Any] = []


class Net(nn.Module):
    """Two linears and an embedding; `proj` is what most rows spoil."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 32)
        self.proj = nn.Linear(32, 32)
        self.out = nn.Linear(32, 16)

    def forward(self, input_ids, attention_mask=None):
        return self.out(torch.relu(self.proj(self.embed(input_ids))))


def net(spec: str | None = "16:2:8") -> Net:
    torch.manual_seed(0)
    model = Net()
    return make_sparse_(model, spec) if spec else model


def with_weight(weight: Any, spec: str | None = "16:2:8") -> Net:
    model = net(spec)
    model.proj.weight = nn.Parameter(weight(model.proj.weight.detach()), requires_grad=False)
    return model


def after(change: Callable[[Net], Any]) -> Net:
    model = net()
    change(model)
    return model


def named(names: Iterable[str]) -> list[Any]:
    return [pytest.param(name, id=name) for name in names]


def row(name: str, build: Build, call: Callable[[Any], Any], match: str, error: Any = VNMError) -> None:
    ROWS.append(pytest.param(build, call, match, error, id=name))


def snapshot(model: Any) -> Any:
    """What must not change: modules, parameters (which, and their bits), hooks, flags, annotations."""
    if not isinstance(model, nn.Module):
        return repr(type(model))
    modules = [
        (
            name,
            type(m),
            m.training,
            len(m._forward_hooks),
            len(m._forward_pre_hooks),
            sorted(set(vars(m)) - {"_is_torch_compile"}),
        )
        for name, m in model.named_modules()
    ]
    tensors = [
        (n, id(t), t.requires_grad, t.dtype, _bits(t)) for n, t in [*model.named_parameters(), *model.named_buffers()]
    ]
    return modules, tensors


_TORCHS = {"_is_torch_compile"}  # what torch.compile leaves on a module


def _bits(tensor: torch.Tensor) -> Any:
    if isinstance(tensor, VNMTensor):
        return tuple(_bits(array) for array in tensor.packed)
    if (
        tensor.is_meta
        or isinstance(tensor, nn.parameter.UninitializedTensorMixin)
        or type(tensor)
        not in (
            torch.Tensor,
            nn.Parameter,
        )
    ):
        return tuple(tensor.shape) if not isinstance(tensor, nn.parameter.UninitializedTensorMixin) else None
    return tensor.detach().contiguous().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


# Patterns.

for text in (
    "", " ", "64", "64:2", "64:2:8:1", "a:b:c", "64,2,8", "64.0:2:8", "1e2:2:8", "-1:2:8", "64:2:8\0",
    "64:2:8; rm -rf /",
    "../64:2:8", "64::8", ":::", "64:2:8\n\n64:2:8", "[/red]", "9" * 5000 + ":2:8", "0x40:2:8", "∞:2:8",
):  # fmt: skip
    row(f"spec {text[:16]!r}", net, lambda m, text=text: vnm.annotate(m, text), "V:N:M pattern|v=")
for text, part in (
    ("64:3:8", "n=3"),
    ("64:0:8", "n=0"),
    ("0:2:8", "v=0"),
    ("64:2:3", "m=3"),
    ("64:2:65537", "m=65537"),
    ("64:2:0", "m=0"),
):
    row(f"spec {text}", net, lambda m, text=text: vnm.annotate(m, text), part)
for value in (None, 64, (64, 2, 8), b"64:2:8", ["64:2:8"], 64.5, object, {1: 2, 3: 4}.keys()):
    row(f"spec of type {type(value).__name__}", net, lambda m, v=value: vnm.annotate(m, v), "", (VNMError, TypeError))
for values in ((64.0, 2, 8), ("64", 2, 8), (None, 2, 8), (True, 2, 8), (64, True, 8), (64, 2, float("nan"))):
    row(f"Spec{values}", net, lambda m, values=values: Spec(*values), "three integers")

# annotate: selectors.

row("annotate {}", net, lambda m: vnm.annotate(m, {}), "pattern|no ")
row("annotate include []", net, lambda m: vnm.annotate(m, "16:2:8", include=[]), "include|no ")
row("annotate all None", net, lambda m: vnm.annotate(m, {"*": None}), "no ")
row("annotate too large", net, lambda m: vnm.annotate(m, "512:2:8"), "large|small")
row("annotate no such layer", net, lambda m: vnm.annotate(m, "16:2:8", include="nothing"), "fits nothing")
row("annotate no such class", net, lambda m: vnm.annotate(m, "16:2:8", include=nn.Conv2d), "fits Conv2d")
row("annotate no such exclude", net, lambda m: vnm.annotate(m, "16:2:8", exclude=["x.*"]), r"fits x\.\*")
row("annotate one of two", net, lambda m: vnm.annotate(m, "16:2:8", include=["proj", "../proj"]), "fits ../proj")
row("annotate markup", net, lambda m: vnm.annotate(m, "16:2:8", include=["[/red]"]), r"fits \[/red\]")
row("annotate bracket", net, lambda m: vnm.annotate(m, "16:2:8", include=["["]), r"fits \[")
row("annotate very long", net, lambda m: vnm.annotate(m, "16:2:8", include="x" * 10000), "fits x")
row("annotate empty name", net, lambda m: vnm.annotate(m, "16:2:8", include=[""]), "fits|name")
for value in (5, [None], [5], 2.5, [nn.Linear(2, 2)]):
    row(
        f"annotate include {value!r}"[:32],
        net,
        lambda m, v=value: vnm.annotate(m, "16:2:8", include=v),
        "",
        (VNMError, TypeError),
    )
row("annotate key of no name", net, lambda m: vnm.annotate(m, {5: "16:2:8"}), "", (VNMError, TypeError))
row("annotate bad rule", net, lambda m: vnm.annotate(m, {"proj": "16:2:8", "out": "16:9:8"}), "n=9")
row("annotate no linears", lambda: nn.Sequential(nn.ReLU()), lambda m: vnm.annotate(m, "16:2:8"), "no linear layer")
for model in (None, 3, "model", {"proj": 1}, [nn.Linear(4, 4)], torch.zeros(4, 4), nn.Linear):
    for name in ("annotate", "sparsify", "compress_model", "decompress_model", "explain"):
        arguments = ("16:2:8",) if name in ("annotate", "sparsify") else ()
        row(
            f"{name} of a {type(model).__name__}",
            lambda model=model: model,
            lambda m, name=name, arguments=arguments: getattr(vnm, name)(m, *arguments),
            "module|model",
            (VNMError, TypeError),
        )

# Layers whose weights cannot be pruned or compressed, each for a reason of its own.


def parametrized(register: Callable[[nn.Module], Any]) -> Build:
    return lambda: after(lambda m: register(m.proj))


class Halve(nn.Module):
    def forward(self, weight):
        return weight / 2


class Quantised(torch.Tensor):
    """Stands for the subclasses of torchao and bitsandbytes: a weight that stores its values in a way of its own."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=torch.float32)

    def __init__(self, inner):
        self.inner = inner

    def __tensor_flatten__(self):
        return ["inner"], None

    @staticmethod
    def __tensor_unflatten__(inner, context, size, stride):
        return Quantised(inner["inner"])

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return args[0]
        raise NotImplementedError(f"Quantised has no {func}")


def lazy() -> nn.Module:
    model = net()
    model.proj = nn.LazyLinear(32)
    return model


@functools.cache
def mesh() -> Any:
    import tempfile

    from torch.distributed import device_mesh, init_process_group, is_initialized

    if not is_initialized():
        init_process_group("gloo", init_method=f"file://{tempfile.mkdtemp()}/rendezvous", rank=0, world_size=1)
    return device_mesh.init_device_mesh("cpu", (1,))


def sharded() -> nn.Module:
    from torch.distributed.tensor import Shard, distribute_tensor

    return with_weight(lambda w: distribute_tensor(w, mesh(), [Shard(0)]))


UNUSABLE: dict[str, Build] = {
    "meta": lambda: after(lambda m: m.proj.to("meta")),
    "int8": lambda: with_weight(lambda w: (w * 100).to(torch.int8)),
    "bool": lambda: with_weight(lambda w: w != 0),
    "complex": lambda: with_weight(lambda w: w.to(torch.complex64)),
    "float8": lambda: with_weight(lambda w: w.to(torch.float8_e4m3fn)),
    "quantised": lambda: with_weight(Quantised),
    "parametrized": parametrized(lambda p: parametrize.register_parametrization(p, "weight", Halve())),
    "weight_norm": parametrized(parametrizations.weight_norm),
    "old weight_norm": parametrized(nn.utils.weight_norm),
    "spectral_norm": parametrized(parametrizations.spectral_norm),
    "nn.utils.prune": parametrized(lambda p: prune.l1_unstructured(p, "weight", 0.5)),
    "lazy": lazy,
    "DTensor": sharded,
    "NaN": lambda: with_weight(lambda w: w.index_fill(0, torch.tensor([3]), torch.nan)),
    "3-D": lambda: with_weight(lambda w: w[None]),
}
for name, build in UNUSABLE.items():
    row(f"sparsify {name}", build, lambda m: vnm.sparsify(m, "16:2:8", progress=False), "proj")
    row(f"compress_model {name}", build, lambda m: vnm.compress_model(m, "16:2:8"), "proj")
row(
    "sparsify inf",
    lambda: with_weight(lambda w: w.fill_(torch.inf)),
    lambda m: vnm.sparsify(m, "16:2:8", progress=False),
    "proj",
)
row(
    "sparsify compressed",
    lambda: after(vnm.compress_model),
    lambda m: vnm.sparsify(m, "16:2:8", progress=False),
    "compressed",
)

# sparsify: arguments and calibration.

IDS = torch.arange(16).view(2, 8)


def sparsify(*args: Any, **kwargs: Any) -> Callable[[Any], Any]:
    return lambda m: vnm.sparsify(m, "16:2:8", *args, progress=False, **kwargs)


for method in ("magic", "", None, 5, ["magnitude"]):
    row(f"sparsify method {method!r}", net, sparsify(method), "", (VNMError, TypeError))
for method in ("wanda", "second_order", "fisher"):
    row(f"{method} without data", net, sparsify(method), "calibration")
    row(f"{method} with no batches", net, sparsify(method, calibration=[]), "calibration")
    row(f"{method} tokens beyond the vocabulary", net, sparsify(method, calibration=[IDS + 100]), "calibration")
row("wanda numpy", net, sparsify("wanda", calibration=[IDS.numpy()]), "calibration")
row("wanda one numpy array", net, sparsify("wanda", calibration=IDS.numpy()), "calibration")
row("wanda wrong keys", net, sparsify("wanda", calibration=[{"tokens": IDS}]), "calibration")
row("wanda wrong dtype", net, sparsify("wanda", calibration=[torch.randn(2, 8)]), "calibration")
row("wanda text", net, sparsify("wanda", calibration=["some text"]), "calibration")
row("wanda a dict of other names", net, sparsify("wanda", calibration={"tokens": IDS}), "calibration")
row("wanda a number", net, sparsify("wanda", calibration=5), "", (VNMError, TypeError))
row("wanda None in it", net, sparsify("wanda", calibration=[None]), "calibration")
row("unknown norm", net, lambda m: vnm.prune.Magnitude(norm="l3"), "norm")
row("negative damping", net, lambda m: vnm.prune.SecondOrder(damping=-1.0), "damping")
row("a method's class without its options", net, sparsify(vnm.prune.Wanda), r"vnm.prune.Wanda\(\.\.\.\)")
row("permute without data", net, sparsify(permute=True), "calibration")
row("checkpoint with fisher", net, sparsify("fisher", calibration=[IDS], checkpoint="x"), "checkpoint")
row("held_out wrong keys", net, sparsify(held_out=[{"tokens": IDS}]), "held_out|held-out|batch|data")
row("sparsify no layer", net, sparsify(include="nothing"), "fits nothing")
row("sparsify too large", net, lambda m: vnm.sparsify(m, "512:2:8", progress=False), "large|small")


@pytest.mark.parametrize("name", named(["checkpoint is a file"]))
def test_a_checkpoint_that_is_a_file(name, tmp_path):
    file, model = tmp_path / "file", net()
    file.write_text("x")
    before = snapshot(model)
    with pytest.raises(VNMError, match=r"checkpoint|file"):
        sparsify("wanda", calibration=[IDS], checkpoint=file)(model)
    assert snapshot(model) == before


HOSTILE = ("../x", "/abs", "[/red]", "n" * 300, "~", "a\\b", "CON", "a b", "%2e%2e", "\n", "\N{SKULL}", "..", "")


@pytest.mark.parametrize("name", [pytest.param(n, id=ascii(n)[:20]) for n in HOSTILE])
def test_hostile_layer_names(name, tmp_path, monkeypatch):
    """A layer may be named anything: it is pruned, checkpointed and printed, and nothing is written outside."""
    monkeypatch.chdir(tmp_path)
    inside = tmp_path / "one" / "two"
    model = nn.Module()
    model._modules[name] = nn.Linear(32, 32)
    model.forward = lambda x: model._modules[name](x)
    report = vnm.sparsify(model, "16:2:8", "wanda", calibration=[torch.randn(4, 32)], checkpoint=inside, progress=False)
    assert [layer.name for layer in report.layers] == [name]
    assert name.split("\n")[0][:20] in str(report).replace("\\", "\\")
    assert str(vnm.explain(model))
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert written
    assert all(inside.resolve() in path.resolve().parents for path in written)
    assert not Path("/abs").exists()


# compress, matches, detect, VNMTensor.

for name, value in {
    "1-D": torch.zeros(8), "3-D": torch.zeros(2, 8, 8), "0-d": torch.tensor(1.0),
    "int8": torch.zeros(16, 8, dtype=torch.int8),
    "complex": torch.zeros(16, 8, dtype=torch.complex64), "bool": torch.zeros(16, 8, dtype=torch.bool),
    "meta": torch.zeros(16, 8, device="meta"), "sparse": torch.eye(16).to_sparse(),
    "float8": torch.zeros(16, 8).to(torch.float8_e5m2),
    "quantised": Quantised(torch.zeros(16, 8)),
}.items():  # fmt: skip
    row(f"compress {name}", lambda value=value: value, lambda w: vnm.compress(w, "16:2:8"), "", VNMError)
for name, value in {
    "1-D": torch.zeros(8),
    "3-D": torch.zeros(2, 8, 8),
    "0-d": torch.tensor(1.0),
    "meta": torch.zeros(16, 8, device="meta"),
}.items():
    row(f"matches {name}", lambda value=value: value, lambda w: vnm.matches(w, "16:2:8"), "", VNMError)
    row(f"detect {name}", lambda value=value: value, vnm.detect, "", VNMError)
for value in (None, [[1.0]], np.zeros((16, 8)), nn.Linear(8, 16), "weight"):
    for name in ("compress", "matches", "detect"):
        arguments = () if name == "detect" else ("16:2:8",)
        row(
            f"{name} a {type(value).__name__}",
            lambda value=value: value,
            lambda w, name=name, arguments=arguments: getattr(vnm, name)(w, *arguments),
            "tensor|weight|dim",
            (VNMError, TypeError),
        )
row("compress a violation", lambda: torch.ones(32, 32), lambda w: vnm.compress(w, "16:2:8"), "is not 16:2:8")
row("compress a bad spec", lambda: torch.ones(32, 32), lambda w: vnm.compress(w, "16:2"), "not a V:N:M pattern")


def rebuilt(**changed: Any) -> Callable[[Any], Any]:
    """A VNMTensor made by hand with one thing changed."""

    def call(_: Any) -> Any:
        good = vnm.compress(random_sparse(32, 32, "16:2:8"), "16:2:8")
        parts = {
            "values": good.values,
            "metadata": good.metadata,
            "columns": good.columns,
            "spec": good.spec,
            "shape": (32, 32),
        }
        parts |= {name: change(parts[name]) if callable(change) else change for name, change in changed.items()}
        return VNMTensor(*parts.values())

    return call


for name, changed in {
    "values cut": {"values": lambda a: a[:-1]},
    "values 1-D": {"values": lambda a: a.flatten()},
    "values int": {"values": lambda a: a.int()},
    "metadata cut": {"metadata": lambda a: a[:, :-1]},
    "metadata dtype": {"metadata": lambda a: a.int()},
    "columns cut": {"columns": lambda a: a[:, :-1]},
    "columns beyond m": {"columns": lambda a: a + 200},
    "columns not increasing": {"columns": lambda a: a.flip(-1)},
    "columns negative": {"columns": lambda a: a.char() - 100},
    "columns dtype": {"columns": lambda a: a.float()},
    "shape larger": {"shape": (64, 32)},
    "shape wider": {"shape": (32, 64)},
    "shape negative": {"shape": (-32, 32)},
    "shape 1-D": {"shape": (32,)},
    "spec other": {"spec": Spec(64, 2, 8)},
    "spec text": {"spec": "x"},
    "values None": {"values": None},
}.items():
    row(f"VNMTensor {name}", lambda: None, rebuilt(**changed), "", (VNMError, TypeError))


# compress_model, decompress_model, refresh.


def broken() -> nn.Module:
    model = net()
    vnm.annotate(model, "16:2:8", include=["proj"])
    with torch.no_grad():
        model.proj.weight.fill_(1.0)
    return model


row("compress_model no pattern", lambda: net(None), vnm.compress_model, "no linear layer")
row("compress_model broken", broken, vnm.compress_model, r"^proj: weight \[32, 32\] is not 16:2:8")
row("compress_model broken spec", lambda: net(None), lambda m: vnm.compress_model(m, "16:2:8"), "^(proj|out): weight")
row("compress_model no such layer", net, lambda m: vnm.compress_model(m, include="nothing"), "fits nothing")
row("compress_model bad spec", net, lambda m: vnm.compress_model(m, "x"), "V:N:M pattern")
row("compress_model include []", net, lambda m: vnm.compress_model(m, include=[]), "")
for value in (None, 3, "model"):
    row(f"refresh a {type(value).__name__}", lambda v=value: v, vnm.refresh, "", (VNMError, TypeError))

# explain, inspect, select_spec.

row("explain broken", broken, lambda m: vnm.explain(m, IDS), "proj: weight")
row("explain broken without inputs", broken, vnm.explain, "proj: weight")
row("explain options", net, lambda m: vnm.explain(m, IDS, options={"vnm.polcy": 1}), "vnm.polcy")
row("explain options of no dict", net, lambda m: vnm.explain(m, IDS, options=5), "options", (VNMError, TypeError))
row("explain no such layer", net, lambda m: vnm.explain(m)["nothing"], "nothing", (VNMError, KeyError))
row("inspect no such target", net, lambda m: vnm.inspect(m, IDS, target="sm_1"), "sm_1")
row("inspect empty target", net, lambda m: vnm.inspect(m, IDS, target=""), "target|''")
row("inspect options", net, lambda m: vnm.inspect(m, IDS, options={"vnm.x": 1}), "vnm.x")
row("inspect broken", broken, lambda m: vnm.inspect(m, IDS), "proj: weight")
row("select_spec speedup 0", net, lambda m: vnm.select_spec(m, 0), "speedup")
row("select_spec speedup NaN", net, lambda m: vnm.select_spec(m, float("nan")), "speedup")
row("select_spec speedup text", net, lambda m: vnm.select_spec(m, "2x"), "", (VNMError, TypeError))
row("select_spec too much", net, lambda m: vnm.select_spec(m, 1e9), "no candidate reaches")
row("select_spec no candidates", net, lambda m: vnm.select_spec(m, candidates=[]), "at least one candidate")
row("select_spec bad candidate", net, lambda m: vnm.select_spec(m, candidates=["x"]), "V:N:M pattern")
row("select_spec tokens 0", net, lambda m: vnm.select_spec(m, tokens=0), "tokens")
row("select_spec seconds -1", net, lambda m: vnm.select_spec(m, seconds=lambda *_: -1.0), "positive")
row("select_spec no layers", lambda: nn.Sequential(nn.ReLU()), vnm.select_spec, "no linear layer")

# torch.compile.


def compiling(**options: Any) -> Callable[[Any], Any]:
    def call(model: Any) -> Any:
        with torch.no_grad():
            return torch.compile(
                model,
                backend="vnm",
                options={
                    key.replace("_", ".", 1) if key.startswith("vnm_") else key: value for key, value in options.items()
                },
            )(IDS)

    return call


# Dynamo wraps what a backend raises; the sentence is what counts.
row("compile unknown option", net, compiling(vnm_polcy="memory"), r"unknown option vnm\.polcy", Exception)
row("compile policy", net, compiling(vnm_policy="speed"), r"vnm\.policy='speed'", Exception)
row("compile policy None", net, compiling(vnm_policy=None), r"vnm\.policy=None", Exception)
row("compile policy list", net, compiling(vnm_policy=["memory"]), r"vnm\.policy=", Exception)
row("compile detect 1", net, compiling(vnm_detect=1), r"vnm\.detect=1", Exception)
row("compile merge text", net, compiling(vnm_merge="yes"), r"vnm\.merge='yes'", Exception)
row("compile unknown Inductor key", net, compiling(no_such_option=1), "no_such_option", Exception)
row("compile broken", broken, compiling(), "proj: weight", Exception)
row("compile broken memory", broken, compiling(vnm_policy="memory"), "proj: weight", Exception)
row(
    "compile mode", net, lambda m: torch.compile(m, backend="vnm", mode="fastest")(IDS), "mode|fastest", Exception
)  # fmt: skip


@pytest.mark.parametrize(("build", "call", "match", "error"), ROWS)
def test_bad_input(build, call, match, error):
    model = build()
    before = snapshot(model)
    with pytest.raises(error, match=match) as raised:
        call(model)
    assert snapshot(model) == before
    assert not isinstance(raised.value, AssertionError)


def test_there_are_enough_rows():
    assert len(ROWS) >= 120
    assert len({each.id for each in ROWS}) == len(ROWS)


EXPLAINED = [f"explain {name}" for name in UNUSABLE if name != "NaN"]


@pytest.mark.parametrize("name", named(EXPLAINED))
def test_explain_says_why_not(name):
    """Such a layer is no error for `explain` and `annotate` of others: it is dense, with a reason."""
    model = UNUSABLE[name.removeprefix("explain ")]()
    before = snapshot(model)
    report = vnm.explain(model)
    layer = next(layer for layer in report.layers if layer.name == "proj")
    assert layer.decision != "sparse"
    assert layer.reason
    assert snapshot(model) == before


@pytest.mark.parametrize("name", named(["hostile checkpoint"]))
def test_a_hostile_checkpoint_is_refused(name):
    """`torch.load(weights_only=True)` knows our classes; arrays that would read foreign memory become no weight."""
    import io

    good = vnm.compress(random_sparse(32, 32, "16:2:8"), "16:2:8")
    bad = copy.copy(good.columns) + 200
    state = {"weight": good}
    file = io.BytesIO()
    good.columns = bad
    torch.save(state, file)
    file.seek(0)
    model = nn.Module()
    model.weight = nn.Parameter(vnm.compress(random_sparse(32, 32, "16:2:8"), "16:2:8"), requires_grad=False)
    before = snapshot(model)
    with pytest.raises(Exception, match=r"column|range|V:N:M|pattern"):
        model.load_state_dict(torch.load(file, weights_only=True))
    assert snapshot(model) == before
