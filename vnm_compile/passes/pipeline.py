"""The passes as a list. `TORCH_LOGS="+vnm_compile"` shows what each made of the graph.

What the graph tells is found once (`FIND`). What depends on the weights is asked again when they change their pattern:
`PLAN` decides, `WRITE` carries out what was decided.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from vnm_compile.annotate import annotations_by_weight
from vnm_compile.options import Options
from vnm_compile.passes.find import Site, find_linears
from vnm_compile.passes.higher_order import flatten
from vnm_compile.passes.lost_writes import refuse_lost_writes
from vnm_compile.passes.merge import Unit, merge
from vnm_compile.passes.plan import Decision, plan
from vnm_compile.passes.rewrite import Rewritten, rewrite
from vnm_compile.problem import Measure

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Progress:
    """A graph on its way through the passes, and what they have found out about it.

    Attributes:
        gm: the graph; Dynamo's, then one in which regions are written out.
        inputs: the values of its placeholders.
        options: ours.
        measure: times sparse against dense; None where nothing can be measured.
        names: of layers by the id of their weight, where more is known than the graph tells.
        read_only: positions of results that are views of compressed weights.
        sites: every multiplication by a stored weight.
        decisions: one a site.
        units: what becomes one op.
        rewritten: the graph with our ops; None where nothing is sparse and it stays as it was.
    """

    gm: fx.GraphModule
    inputs: Sequence[Any]
    options: Options
    measure: Measure | None = None
    names: Mapping[int, str] | None = None
    read_only: tuple[int, ...] = ()
    sites: Sequence[Site] = ()
    decisions: Sequence[Decision] = ()
    units: Sequence[Unit] = ()
    rewritten: Rewritten | None = None


@dataclass(frozen=True)
class Pass:
    """One step: what it is called, what it does, and what it tells of it, a line each."""

    name: str
    run: Callable[[Progress], Progress]
    record: Callable[[Progress], Iterable[str]]


def _graph(progress: Progress) -> Iterable[str]:
    gm = progress.rewritten.gm if progress.rewritten is not None else progress.gm
    return str(gm.graph).splitlines()


def _flatten(progress: Progress) -> Progress:
    return replace(progress, gm=flatten(progress.gm))


def _refuse(progress: Progress) -> Progress:
    return replace(progress, read_only=refuse_lost_writes(progress.gm.graph, progress.inputs))


def _find(progress: Progress) -> Progress:
    return replace(progress, sites=find_linears(progress.gm.graph, progress.inputs))


def _plan(progress: Progress) -> Progress:
    annotations = annotations_by_weight()
    asked = progress.sites, progress.inputs, progress.options, annotations, progress.measure, progress.names
    return replace(progress, decisions=plan(*asked))


def _merge(progress: Progress) -> Progress:
    return replace(progress, units=merge(progress.decisions, progress.options.merge))


def _rewrite(progress: Progress) -> Progress:
    return replace(progress, rewritten=rewrite(progress.gm, progress.units) if progress.units else None)


FIND = (
    Pass("flatten", _flatten, _graph),
    Pass("refuse lost writes", _refuse, lambda p: (f"result {i}: a view of a compressed weight" for i in p.read_only)),
    Pass("find", _find, lambda p: (f"{s.node.name}: {s.name} ({s.reason or 'may be sparse'})" for s in p.sites)),
)
PLAN = (Pass("plan", _plan, lambda p: (f"{d.name}: {d.spec or 'dense'} ({d.reason})" for d in p.decisions)),)
WRITE = (
    Pass("merge", _merge, lambda p: (f"{u.kind}: {', '.join(m.name for m in u.members)}" for u in p.units)),
    Pass("rewrite", _rewrite, _graph),
)
PASSES = (*FIND, *PLAN, *WRITE)
"""All of them, in order."""


def run_passes(passes: Sequence[Pass], progress: Progress) -> Progress:
    """Run passes one after another, and tell the log what each has done."""
    for each in passes:
        progress = each.run(progress)
        if log.isEnabledFor(logging.DEBUG):
            log.debug("after %s:\n%s", each.name, "\n".join(f"    {line}" for line in each.record(progress)))
    return progress
