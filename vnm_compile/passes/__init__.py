"""The FX passes; `pipeline.PASSES` lists them in order: flatten, refuse, find, plan, merge, rewrite.

Each is a function over the graph Dynamo hands over and returns a record of what it did; none touches the user's
modules, and none knows what a kernel looks like.
"""

from vnm_compile.passes.find import Site, find_linears
from vnm_compile.passes.higher_order import flatten
from vnm_compile.passes.lost_writes import read_only_results
from vnm_compile.passes.merge import Unit, merge
from vnm_compile.passes.pipeline import FIND, PASSES, PLAN, WRITE, Pass, Progress, run_passes
from vnm_compile.passes.plan import Decision, plan
from vnm_compile.passes.rewrite import PackedInput, Rewritten, own_copy, rewrite

__all__ = [
    "FIND",
    "PASSES",
    "PLAN",
    "WRITE",
    "Decision",
    "PackedInput",
    "Pass",
    "Progress",
    "Rewritten",
    "Site",
    "Unit",
    "find_linears",
    "flatten",
    "merge",
    "own_copy",
    "plan",
    "read_only_results",
    "rewrite",
    "run_passes",
]
