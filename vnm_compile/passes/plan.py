"""Decide for every site whether it becomes sparse, and how its weight is stored then."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vnm_compile._torch import FakeTensor, is_traceable_wrapper_subclass
from vnm_compile.annotate import Annotation
from vnm_compile.layout import Layout
from vnm_compile.options import Options
from vnm_compile.passes.find import Site, hint
from vnm_compile.problem import Failure, Measure, Problem, Timing
from vnm_compile.spec import Spec
from vnm_compile.tensor import VNMTensor
from vnm_compile.weights import detected_spec, hold_to_pattern


@dataclass(frozen=True)
class Decision:
    """What becomes of a site, and why.

    Attributes:
        site: where.
        name: the layer: as annotated (the full name also in regional compile), else as the graph knows it.
        layout: how its weight is stored, compressed; None where it stays dense.
        reason: one line that a user can act on.
        tokens: rows of the activation, as far as the graph knows (a hint where they are dynamic).
        shape: `[out_features, in_features]`, where known.
        dtype: the weight's dtype, where known.
        timing: what was measured, if anything was.
        only_for_gradients: an annotated layer in evaluation mode is dense only because gradients are on and its weight
            requires one.
        compressed: its weight is stored compressed, and multiplied by as it is.
    """

    site: Site
    name: str
    layout: Layout | None
    reason: str
    tokens: int | None = None
    shape: tuple[int, int] | None = None
    dtype: torch.dtype | None = None
    timing: Timing | None = None
    only_for_gradients: bool = False
    compressed: bool = False

    @property
    def sparse(self) -> bool:
        """Whether the site is rewritten."""
        return self.layout is not None

    @property
    def spec(self) -> Spec | None:
        """The pattern of its weight; None where it stays dense."""
        return self.layout.spec if self.layout is not None else None


def plan(
    sites: Sequence[Site],
    inputs: Sequence[Any],
    options: Options,
    annotations: Mapping[int, Annotation],
    measure: Measure | None = None,
    names: Mapping[int, str] | None = None,
) -> list[Decision]:
    """Return one decision a site.

    Args:
        sites: from `find_linears`.
        inputs: values of the graph's placeholders.
        options: policy and whether unannotated weights are looked at.
        annotations: pattern by the id of the weight.
        measure: times sparse against dense under policy "latency"; None means that nothing can be measured here.
        names: of layers that are not annotated, by the id of the weight; without, they have those of the graph.

    Raises:
        VNMError: an annotated weight breaks its pattern.
    """
    decisions: list[Decision | _Candidate] = []
    for site in sites:
        weight = inputs[site.index] if site.index is not None else None
        annotation = annotations.get(id(weight))
        name = annotation.name if annotation is not None else (names or {}).get(id(weight), site.name)
        if site.reason is None and weight is not None:
            decisions.append(_decide(site, name, weight, inputs, options, annotation))
        else:
            matrix = weight if weight is not None and weight.dim() == 2 else None
            shape, dtype = (tuple(matrix.shape), matrix.dtype) if matrix is not None else (None, None)
            decisions.append(Decision(site, name, None, site.reason or "", shape=shape, dtype=dtype))
    # All problems at once: their kernels are compiled side by side.
    problems = [each.problem for each in decisions if isinstance(each, _Candidate)]
    answers = iter(measure(problems) if measure else [None] * len(problems))
    return [_settle(each, next(answers)) if isinstance(each, _Candidate) else each for each in decisions]


class _Candidate(NamedTuple):
    """A site that is sparse if that is faster."""

    decision: Decision
    problem: Problem


def _decide(
    site: Site, name: str, weight: Tensor, inputs: Sequence[Any], options: Options, annotation: Annotation | None
) -> Decision | _Candidate:
    """What becomes of a site as far as that can be said without measuring."""
    tokens = _tokens(site)
    out_features, in_features = reversed(weight.shape) if site.transposed else weight.shape

    def decide(layout: Layout | None, reason: str) -> Decision:
        return Decision(site, name, layout, reason, tokens, (out_features, in_features), weight.dtype)

    if isinstance(weight, FakeTensor) or weight.is_meta:
        return decide(None, "its weight has no values yet (fake or meta tensor)")
    if weight.requires_grad and site.mode.grad:
        decision = decide(None, "its weight trains (requires grad); use torch.no_grad() or freeze it")
        return replace(decision, only_for_gradients=annotation is not None and annotation.evaluates)
    if any(_share_memory(weight, inputs[i]) for i in site.written):
        return decide(None, "the graph writes to memory that its weight is a view of, after it would have been packed")
    if isinstance(weight, VNMTensor):
        if weight._transposed != site.transposed:
            return decide(None, "stored compressed the other way round than it multiplies here; it is unpacked")
        return replace(decide(weight.layout_of_arrays, "stored compressed"), compressed=True)
    spec, found = _pattern(site, weight, options, annotation)
    if spec is None:
        return decide(None, found)
    layout = Layout(spec, out_features, in_features)
    if layout.nbytes(weight.dtype) >= weight.numel() * weight.element_size():
        return decide(None, f"{found}, but packed it would be no smaller")
    if options.policy == "memory":
        return decide(layout, f"{found}, policy is memory")
    return _Candidate(decide(layout, found), Problem(tokens or 1, layout, weight.dtype, weight.device).measured())


def _settle(candidate: _Candidate, timing: Timing | Failure | None) -> Decision:
    """What becomes of a site once its problem was measured."""
    decision, problem = candidate
    found = decision.reason
    if timing is None:
        reason = f'{found}, but no sparse kernel for it here; vnm.policy="memory" compresses it'
        return replace(decision, layout=None, reason=reason)
    if isinstance(timing, Failure):
        return replace(decision, layout=None, reason=f"{found}, but measuring it failed ({timing.reason})")
    reason = (
        f"{found}; measured {timing.sparse * 1e6:.0f} us sparse, {timing.dense * 1e6:.0f} us dense "
        f"at T = {problem.tokens}"
    )
    layout = decision.layout if timing.sparse < timing.dense else None
    return replace(decision, layout=layout, reason=reason, timing=timing)


def _share_memory(weight: Tensor, other: Any) -> bool:
    """Whether two tensors are views of one storage; compressed weights have arrays of their own."""
    if isinstance(weight, VNMTensor) or not isinstance(other, Tensor) or other.layout is not torch.strided:
        return weight is other
    if is_traceable_wrapper_subclass(other):
        return weight is other
    return weight.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def _pattern(site: Site, weight: Tensor, options: Options, annotation: Annotation | None) -> tuple[Spec | None, str]:
    """The pattern of a weight and where it is known from, or None and why there is none."""
    if annotation is not None:
        hold_to_pattern(weight, site.transposed, annotation.spec, annotation.name)
        return annotation.spec, "annotated"
    if not options.detect:
        return None, "not annotated, and vnm.detect is off"
    spec = detected_spec(weight, site.transposed)
    if spec is None:
        return None, "no V:N:M pattern in its weight"
    return spec, "pattern found"


def _tokens(site: Site) -> int | None:
    """Rows of the activation; a hint, without a guard, where the shape is symbolic."""
    value = site.x.meta.get("example_value") if site.x is not None else None
    if not isinstance(value, Tensor):
        return None
    tokens = 1
    for size in value.shape[:-1]:
        known = hint(size)
        if known is None:
            return None
        tokens *= int(known)
    return tokens
