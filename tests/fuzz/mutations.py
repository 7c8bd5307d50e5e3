"""The mutants: each undoes what keeps one kind of answer right."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """One way to break the package.

    Attributes:
        name: what is broken.
        edits: (file, text, replacement); each text stands in its file exactly once.
        only: kinds of steps to draw, where the fault needs one of them; all when empty.
        kernels: share of programs through Inductor, where the fault lies in what it generates.
        means: writes to draw, where the fault needs one of them; all when empty.
        storage: of the weights, "dense" or "compressed", where the fault needs it.
    """

    name: str
    edits: tuple[tuple[str, str, str], ...]
    only: tuple[str, ...] = ()
    kernels: float = 0.0
    means: tuple[str, ...] = ()
    storage: str | None = None


_PASSES = "vnm_compile/passes/"


def _weights(name: str, means: str, text: str, replacement: str, file: str = "vnm_compile/contents.py") -> Mutant:
    return Mutant(name, ((file, text, replacement),), only=("chain", "siblings"), means=tuple(means.split()))


MUTANTS: tuple[Mutant, ...] = (
    _weights(
        "optimizer steps raise no doubt",
        "one_row_by_fused_sgd",
        "self.suspect(known_storages(stepped) | trained)",
        "pass",
    ),
    _weights(
        "no fingerprint",
        "data_mul adamw_fused dlpack",
        "return native.fingerprint()(ctypes.c_void_p(address), length // 2)",
        "return 0",
    ),
    _weights(
        "no version counter", "one_row", "return None if tensor.is_inference() else tensor._version", "return None"
    ),
    _weights(
        "a fresh compilation trusts what was packed",
        "one_row_and_compile_again",
        "    contents.suspect(known_storages(inputs[i] for i in positions))\n",
        "",
        "vnm_compile/backend.py",
    ),
    _weights("refresh forgets nothing", "one_row_and_refresh", "        self._all_suspected = self.epoch\n", ""),
    Mutant(
        "places are not compared",  # addresses and storages: either alone sees what the other does
        (
            (
                "vnm_compile/dispatch.py",
                "if [weight.data_ptr() for weight in packed] != self._addresses:",
                "if False:",
            ),
            ("vnm_compile/dispatch.py", "if [*map(id, storages)] != self._storages:", "if False:"),
        ),
        only=("chain", "siblings"),
        means=("data_new", "new_parameter"),
    ),
    _weights(
        "equal sizes count as equal contents",
        "in_place",
        "return all(a.content is b.content for a, b in zip(one, other, strict=True))",
        "return True",
        "vnm_compile/weights.py",
    ),
    Mutant(
        "joining moves a linear past a write",
        ((_PASSES + "merge.py", "effects.writer_between(node, place, *filter(None, read)) is not None", "False"),),
        only=("siblings_written", "gated_written"),
    ),
    Mutant(
        "joining moves a linear out of its region",
        ((_PASSES + "merge.py", "not effects.together(node, place)", "False"),),
        only=("regions", "gated_regions"),
    ),
    Mutant(
        "a region's gradient mode is not followed",
        ((_PASSES + "regions.py", "mode = replace(mode, grad=bool(node.args[0]))", "pass"),),
        only=("nested_grad", "regions"),
    ),
    Mutant(
        "weights that the graph writes to are packed before",
        (
            (_PASSES + "find.py", "    writer = case.effects.writer_of(case.weight)\n", "    writer = None\n"),
            (_PASSES + "plan.py", "any(_share_memory(weight, inputs[i]) for i in site.written)", "False"),
            (
                _PASSES + "find.py",
                "    other = next((user for user in case.weight.users",
                "    other = next((user for user in ()",
            ),
        ),
        only=("weight_written",),
    ),
    Mutant(
        "biases of any shape are joined",
        (
            (
                _PASSES + "merge.py",
                "    bias = decision.site.bias\n    if bias is None:",
                "    bias = None\n    if bias is None:",
            ),
        ),
        only=("siblings",),
    ),
    Mutant(
        "a compressed weight may lie either way round",
        ((_PASSES + "plan.py", "if weight._transposed != site.transposed:", "if False:"),),
        only=("tied",),
    ),
    Mutant(
        "writes into views of compressed weights are lost",
        ((_PASSES + "lost_writes.py", "any(effects.share(written, view) for view in views)", "False"),),
        only=("weight_written",),
        storage="compressed",
    ),
    Mutant(
        "epilogues may read in any order",
        (
            (
                "vnm_compile/codegen/inductor/epilogue.py",
                "isinstance(read, MemoryDep) and read.index == writes[0].index",
                "True",
            ),
        ),
        only=("epilogues", "product_channels_first"),
        kernels=1.0,
    ),
    Mutant(
        "an activation is read from where its buffer begins",
        (("vnm_compile/codegen/cpp/linear.cpp.jinja", "&{{ kernel.index(X, [0, 0]) }}", "x_buffer"),),
        only=("rows", "layouts"),
        kernels=1.0,
    ),
    Mutant(
        "a bias keeps its own dtype under autocast",
        ((_PASSES + "rewrite.py", 'return self.graph.call_method("type_as", (bias, y))', "return bias"),),
        only=("chain", "siblings", "precisions"),
    ),
)
