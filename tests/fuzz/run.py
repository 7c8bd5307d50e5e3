"""Build a program, compile it, call it, write to it, and compare every call with eager."""

from __future__ import annotations

import ast
import contextlib
import copy
import re
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager

import vnm_compile as vnm
from tests.fuzz.compare import LUCK, Difference, difference, error_of
from tests.fuzz.program import DTYPES, Program, Settings, Weight, load, settings_from
from tests.fuzz.writes import AS_DENSE, COMPRESSED_WRITES, DENSE_WRITES
from tests.support import random_sparse
from vnm_compile import backend as ours
from vnm_compile.passes import own_copy, pipeline
from vnm_compile.spec import Spec


@dataclass
class Outcome:
    """What came of one program.

    Attributes:
        status: "right", "wrong" (a result differs), "raises" (ours raises where plain compilation does not), "skipped"
            (plain compilation is wrong or raises too), "invalid" (eager raises on every call), "refused" (the graph
            writes into a compressed weight, and a VNMError says so).
        differences: of the first wrong call.
        graphs, calls: compiled graphs, and calls that were compared.
        units: units of the rewritten graphs, by kind.
    """

    status: str = "right"
    differences: list[Difference] = field(default_factory=list)
    error: str = ""
    call: int = -1
    graphs: int = 0
    calls: int = 0
    units: dict[str, int] = field(default_factory=dict)

    @property
    def signature(self) -> str:
        if self.status == "raises":
            last = self.error.strip().splitlines()[-1] if self.error.strip() else ""
            return f"raises {last.split(':')[0]}"
        if self.status == "wrong":
            return f"wrong {self.differences[0].what}"
        return self.status


class Case:
    """A program whose module is built: the model that is compiled, and a twin in eager mode that stays dense."""

    def __init__(self, source: str, weights: list[Weight], settings: Settings) -> None:
        self.settings, self.weights = settings, weights
        self.make, self.make_double = load(source), load(source, double=True)
        coarse = "BF16" in source or "bfloat16" in source or settings.autocast != "none"
        self.eps = torch.finfo(torch.bfloat16 if coarse else DTYPES[settings.dtype]).eps
        self.twin = self._dense()
        self.model = self._dense()
        if settings.annotated:
            self._annotate(self.model)
        if settings.storage == "compressed":
            self._compress(self.model)
            for mine, theirs in zip(self.twin.parameters(), self.model.parameters(), strict=True):
                mine.requires_grad_(theirs.requires_grad)

    def _dense(self) -> nn.Module:
        generator = torch.Generator().manual_seed(self.settings.seed)
        model = self.make()
        for i, weight in enumerate(self.weights):
            self._fill(model, weight, generator, self.settings.seed * 31 + i)
        model.to(DTYPES[self.settings.dtype])
        model.requires_grad_(not self.settings.frozen or self.settings.mode == "train")
        if self.settings.mode == "train" and self.settings.frozen:
            for i, parameter in enumerate(model.parameters()):
                parameter.requires_grad_(i % 2 == 0)
        if self.settings.flat:
            _flatten(model)
        model.annotated = self.settings.annotated  # type: ignore[assignment]
        return model

    @staticmethod
    def _fill(model: nn.Module, weight: Weight, generator: torch.Generator, seed: int) -> None:
        o, k = weight.out_features, weight.in_features
        spec = Spec.parse(weight.spec) if weight.spec else None
        value = random_sparse(o, k, spec, seed=seed) if spec else torch.randn(o, k, generator=generator)
        value = value * (k * (spec.density if spec else 1.0)) ** -0.5
        owner = getattr(model, weight.name)
        with torch.no_grad():
            if isinstance(owner, nn.Linear):
                owner.weight.copy_(value)
                bias = owner.bias
            else:
                owner.copy_(value.t() if weight.form == "conv1d" else value)
                bias = getattr(model, f"{weight.name}_bias", None)
            if bias is not None:
                bias.copy_(torch.randn(bias.shape, generator=generator) * 0.5)

    def _annotate(self, model: nn.Module) -> None:
        specs = {w.name: w.spec for w in self.weights if w.form == "linear" and w.spec is not None}
        if specs:
            vnm.annotate(model, specs, include=list(specs))  # type: ignore[arg-type]

    def _compress(self, model: nn.Module) -> None:
        for weight in self.weights:
            if weight.spec is None:
                continue
            owner = getattr(model, weight.name)
            if isinstance(owner, nn.Linear):
                owner.weight = nn.Parameter(vnm.compress(owner.weight.detach(), weight.spec), requires_grad=False)
            elif weight.form == "param":
                setattr(
                    model, weight.name, nn.Parameter(vnm.compress(owner.detach(), weight.spec), requires_grad=False)
                )
            else:
                packed = vnm.compress(owner.detach().t(), weight.spec).t()
                setattr(model, weight.name, nn.Parameter(packed, requires_grad=False))

    def write(self, name: str, model: nn.Module, i: int, dense: bool) -> nn.Module:
        """Do what `name` says to a model, before call `i`; to the twin of a compressed model, the dense equivalent."""
        model.called_with = None  # type: ignore[assignment]
        if name == "none":
            return model
        means = AS_DENSE if dense and name in AS_DENSE else {**COMPRESSED_WRITES, **DENSE_WRITES}
        return means[name](model, torch.Generator().manual_seed(self.settings.seed * 1009 + i)) or model


def _flatten(model: nn.Module) -> None:
    """Make the parameters views of one flat buffer, as DeepSpeed, apex and FSDP1 do."""
    parameters = list(model.parameters())
    buffer = torch.cat([p.detach().reshape(-1) for p in parameters])
    start = 0
    for parameter in parameters:
        parameter.data = buffer[start : start + parameter.numel()].view(parameter.shape)
        start += parameter.numel()
    model.flat_buffer = buffer  # type: ignore[assignment]


def make_input(settings: Settings, size: tuple[int, int], seed: int, double: bool = False) -> Tensor:
    """The activation of a call; the same values in every form and precision."""
    batch, tokens = size
    generator = torch.Generator().manual_seed(seed)
    dtype = torch.float64 if double else DTYPES[settings.dtype]
    values = torch.randn(batch, tokens, settings.width, generator=generator).to(DTYPES[settings.dtype]).to(dtype)
    if settings.input == "offset":
        storage = torch.zeros(values.numel() + 8, dtype=dtype)
        x = storage[8:].view(values.shape).copy_(values)
    elif settings.input == "transposed":
        x = torch.zeros(tokens, batch, settings.width, dtype=dtype).transpose(0, 1).copy_(values)
    elif settings.input == "expanded":
        x = values[:1].clone().expand(batch, -1, -1)
    else:
        x = values.clone()
    return x.requires_grad_(settings.mode in ("input_grad", "train"))


@contextlib.contextmanager
def _mode(settings: Settings) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        if settings.mode == "no_grad":
            stack.enter_context(torch.no_grad())
        elif settings.mode == "inference":
            stack.enter_context(torch.inference_mode())
        if settings.autocast != "none":
            stack.enter_context(torch.autocast("cpu", dtype=torch.bfloat16))
        yield


def observe(call: Callable[..., Any], model: nn.Module, x: Tensor, flag: bool, settings: Settings) -> dict[str, Any]:
    """Everything that can be seen of one call: outputs, the input after it, gradients."""
    replaced = getattr(model, "called_with", None)
    with _mode(settings):
        if replaced is not None:
            with torch.nn.utils.stateless._reparametrize_module(model, replaced):
                outputs = call(x, flag)
        else:
            outputs = call(x, flag)
    seen: dict[str, Any] = {f"output {i}": y for i, y in enumerate(outputs)}
    seen["x after the call"] = x.detach()
    if settings.mode != "inference":  # under no_grad, too, a region may record a gradient
        floating = [y for y in outputs if y.is_floating_point() and y.requires_grad]
        for parameter in model.parameters():
            parameter.grad = None
        if floating:
            sum(
                (y.float() if y.dtype != torch.float64 else y).square().mean() for y in floating if y.numel()
            ).backward()
        seen["x.grad"] = x.grad
        for name, parameter in model.named_parameters():
            if replaced is None and parameter.requires_grad:
                seen[f"{name}.grad"] = parameter.grad
    seen = {name: value if value is None or "grad" in name else value.detach() for name, value in seen.items()}
    return seen


def _double_of(case: Case, twin: nn.Module) -> nn.Module:
    model = case.make_double().double()
    state = dict(twin.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(state[name].double())
            parameter.requires_grad_(state[name].requires_grad)
    replaced = getattr(twin, "called_with", None)
    if replaced is not None:
        model.called_with = {name: value.double() for name, value in replaced.items()}  # type: ignore[assignment]
    return model


def _forward(gm: Any, inputs: Any) -> Callable[..., Any]:
    """Run the graph node by node. As Inductor, keep none of Dynamo's notes: they refer to weights, which then cannot be
    swapped."""
    kept = own_copy(gm)
    for node in kept.graph.nodes:
        node.meta.clear()
    return kept.forward


_FINISHES: dict[str, Callable[..., Any]] = {
    "fx": _forward,
    "aot": aot_eager,
    "inductor": lambda gm, inputs: torch._dynamo.lookup_backend("inductor")(gm, inputs),
}
"""What a graph is compiled by where our passes are left out, or where the rewritten graph does not go to Inductor."""


class Compiler:
    """What a model is compiled by: our backend, or the same without our passes."""

    def __init__(self, settings: Settings, sparse: bool) -> None:
        self.settings, self.sparse = settings, sparse
        self.graphs, self.units = 0, {}

    def __call__(self, model: nn.Module) -> Callable[..., Any]:
        return torch.compile(model, backend=self.backend, dynamic=self.settings.dynamic)

    def backend(self, gm: Any, inputs: Any) -> Callable[..., Any]:
        self.graphs += 1
        if not self.sparse:
            return _FINISHES[self.settings.through](gm, inputs)
        return ours.vnm(gm, inputs, options={"vnm.policy": "memory", "vnm.merge": self.settings.merge})

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Count what is joined, and stop short of Inductor where the settings say so."""
        saved = pipeline.merge, ours.compile_graph

        def merge(*args: Any, **kwargs: Any) -> Any:
            units = saved[0](*args, **kwargs)
            for unit in units:
                self.units[unit.kind] = self.units.get(unit.kind, 0) + 1
            return units

        pipeline.merge = merge
        if self.settings.through != "inductor":
            finish = _FINISHES[self.settings.through]
            ours.compile_graph = lambda gm, inputs, *args, **kwargs: finish(gm, inputs)
        try:
            yield
        finally:
            pipeline.merge, ours.compile_graph = saved


def execute(source: str, weights: list[Weight], settings: Settings, sparse: bool = True) -> Outcome:
    """Compile and call the program; the first call that differs from eager, or raises where eager does not, ends it."""
    outcome = Outcome()
    torch._dynamo.reset()
    compiler = Compiler(settings, sparse)
    case = Case(source, weights, settings if sparse else _plain(settings))
    model, twin = case.model, case.twin
    compiled = compiler(model)
    checked = 0
    with compiler.installed(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for i, size in enumerate(settings.calls):
            if i and i <= len(settings.writes):
                try:
                    twin = case.write(settings.writes[i - 1], twin, i, dense=settings.storage == "compressed")
                except Exception:
                    outcome.status, outcome.error = "invalid", traceback.format_exc()
                    return outcome
                try:
                    written = case.write(settings.writes[i - 1], model, i, dense=not sparse)
                except Exception:
                    outcome.status, outcome.call, outcome.error = "raises", i, traceback.format_exc()
                    break
                if written is not model or getattr(written, "compile_again", False):
                    model, written.compile_again = written, False
                    torch._dynamo.reset()  # else Dynamo answers with what it compiled for the same backend
                    compiled = compiler(model)
            for again in range(REPEATS):
                if not _call(case, outcome, (compiled, model, twin), size, i, again):
                    continue
                checked += 1
                if outcome.status != "right":
                    break
            if outcome.status != "right":
                break
    if not checked and outcome.status == "right":
        outcome.status = "invalid"
    outcome.graphs, outcome.units = compiler.graphs, compiler.units
    return outcome


_REFUSED = re.compile("writes into a (view of a )?compressed weight")
"""What a program is told that writes into a compressed weight, which the dense twin may."""

REPEATS = 3
"""Calls of each size, with other values: the second one finds what the first left behind, the third what the second."""


def _call(
    case: Case, outcome: Outcome, models: tuple[Any, nn.Module, nn.Module], size: Any, i: int, again: int
) -> bool:
    """Compare one call; False where eager refuses it, so that there is nothing to compare with."""
    compiled, model, twin = models
    settings, flag = case.settings, i % 3 != 1
    seed = settings.seed * 1009 + i + 500 * again
    try:
        double = _double_of(case, twin)  # before the call, which may write to the weights
        dense = observe(twin, twin, make_input(settings, size, seed), flag, settings)
        reference = observe(double, double, make_input(settings, size, seed, double=True), flag, settings)
    except Exception:
        return False
    try:
        seen = observe(compiled, model, make_input(settings, size, seed), flag, settings)
    except Exception as error:
        refused = settings.storage == "compressed" and _REFUSED.search(str(error)) is not None
        outcome.status, outcome.call, outcome.error = "refused" if refused else "raises", i, traceback.format_exc()
        return True
    outcome.calls += 1
    outcome.differences = _differences(seen, dense, reference, case.eps)
    if outcome.differences and all(each.what == "value" for each in outcome.differences):
        unsure = _conditioning(case, twin, size, seed, flag, reference)
        outcome.differences = [each for each in outcome.differences if each.error > LUCK * unsure.get(each.where, 0.0)]
    if outcome.differences:
        outcome.status, outcome.call = "wrong", i
    return True


def _conditioning(
    case: Case, twin: nn.Module, size: Any, seed: int, flag: bool, reference: Mapping[str, Any]
) -> dict[str, float]:
    """Largest error of eager itself where the input moves by half a unit in its last place: a program may amplify that.

    Asked only where a result differs.
    """
    errors: dict[str, float] = {}
    for i in range(6):
        generator = torch.Generator().manual_seed(i)
        x = make_input(case.settings, size, seed).detach()
        moved = x * (1 + 0.5 * case.eps * torch.randn(x.shape, generator=generator)).to(x.dtype)
        moved.requires_grad_(case.settings.mode in ("input_grad", "train"))
        model = copy.deepcopy(twin)
        for name, value in observe(model, model, moved, flag, case.settings).items():
            if isinstance(value, Tensor) and value.is_floating_point() and isinstance(reference.get(name), Tensor):
                errors[name] = max(errors.get(name, 0.0), error_of(value, reference[name]))
    return errors


def _plain(settings: Settings) -> Settings:
    return settings_from({**asdict(settings), "storage": "dense", "annotated": False})


def _differences(
    seen: Mapping[str, Any], dense: Mapping[str, Any], reference: Mapping[str, Any], eps: float
) -> list[Difference]:
    names = dict.fromkeys([*dense, *seen])
    found = [difference(name, seen.get(name), dense.get(name), reference.get(name), eps) for name in names]
    return [each for each in found if each is not None]


def judge(source: str, weights: list[Weight], settings: Settings) -> Outcome:
    """`execute`, and where that fails, whether plain compilation of the same program fares better."""
    outcome = execute(source, weights, settings)
    if outcome.status not in ("wrong", "raises"):
        return outcome
    plain = execute(source, weights, settings, sparse=False)
    if plain.status in ("wrong", "raises", "invalid") and plain.call <= outcome.call:
        outcome.status = "skipped"
    return outcome


def run(program: Program) -> Outcome:
    return judge(program.source(), program.weights, program.settings)


def replay(script: Mapping[str, Any]) -> Outcome:
    """Run the case that a script's globals describe, print what comes of it, and return it."""
    text = Path(script["__file__"]).read_text()
    model = next(node for node in ast.parse(text).body if isinstance(node, ast.ClassDef))
    weights = [Weight(**weight) for weight in script["WEIGHTS"]]
    outcome = judge(ast.get_source_segment(text, model) or "", weights, settings_from(script["SETTINGS"]))
    print(f"{outcome.status} (call {outcome.call}); graphs {outcome.graphs}, units {outcome.units}")
    for each in outcome.differences:
        print(f"  {each}")
    print(outcome.error)
    return outcome
