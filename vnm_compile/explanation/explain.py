"""`vnm.explain`: run the passes as the backend would, and say layer by layer what came of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import fx, nn

from vnm_compile.backend import Prepared
from vnm_compile.errors import BadOption
from vnm_compile.explanation.describe import describe_graphs
from vnm_compile.explanation.explanation import Explanation
from vnm_compile.inventory import dense_weights
from vnm_compile.layers import check_module, linear_layers, on_values
from vnm_compile.options import split_options
from vnm_compile.tracing import record_graphs, used_parameters


def explain(model: nn.Module, *args: Any, options: Mapping[str, Any] | None = None, **kwargs: Any) -> Explanation:
    """Return, for every linear of `model`, whether `backend="vnm"` runs it sparse, why, and what that is worth.

    With inputs the model is traced and called once (in eager mode, gradients off), and the decisions are those that
    compiling it with the same inputs would take, measurements included. Where a layer is in no graph, the model is
    called once more, to tell whether it runs outside of the graphs or not at all. Without inputs the weights alone are
    looked at.

    What else multiplies by weights (experts, convolutions) is listed as dense and counted, too.

    Args:
        model: the model; a compiled one, or one with compiled parts, is explained by what it was compiled from. Names
            are those of the model before it was compiled.
        args, kwargs: its inputs.
        options: as for `torch.compile`.

    Raises:
        VNMError: no module is given, an annotated weight breaks its pattern, or an unknown `vnm.` option.
    """
    check_module(model)
    model = getattr(model, "_orig_mod", model)
    if options is not None and not isinstance(options, Mapping):
        raise BadOption(f"options is a {type(options).__name__}; give a dict, as to torch.compile.")
    ours, _ = split_options(options)
    if not args and not kwargs:
        return describe_graphs(model, [])
    in_graphs: set[int] = set()

    def see(gm: fx.GraphModule, inputs: Sequence[Any], prepared: Prepared) -> None:
        in_graphs.update(map(id, inputs))

    graphs = record_graphs(model, args, kwargs, ours, see)
    missing = [p for p in _multiplying(model) if id(p) not in in_graphs]
    run = in_graphs | (used_parameters(model, args, kwargs) if missing else set())
    return describe_graphs(model, graphs, in_graphs, run)


def _multiplying(model: nn.Module) -> list[Any]:
    linears = [layer.stored for layer in linear_layers(model)]
    values = [module.values for _, module in on_values(model)]
    return [*linears, *values, *(each.parameter for each in dense_weights(model))]
