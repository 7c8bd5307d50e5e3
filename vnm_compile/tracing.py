"""Record the graphs that a model's compilation would make: Dynamo and our passes run, nothing is compiled.

Under `vnm.explain` and `vnm.inspect`, which make records of what is found here.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from types import FunctionType
from typing import Any

import torch
from torch import fx, nn
from torch.overrides import TorchFunctionMode

from vnm_compile._torch import static_sizes, tree_leaves, unwrapped_errors
from vnm_compile.backend import Prepared, prepare
from vnm_compile.errors import VNMError
from vnm_compile.inventory import dense_weights
from vnm_compile.layers import linear_layers
from vnm_compile.options import Options

log = logging.getLogger(__name__)

See = Callable[[fx.GraphModule, Sequence[Any], Prepared], None]
"""`see(gm, inputs, prepared)`: a graph of Dynamo's, its inputs with the real parameters, and what the passes made."""


def record_graphs(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    options: Options,
    see: See | None = None,
    dynamic: bool | None = None,
) -> list[Prepared]:
    """Return the graphs of one call of `model`, as `backend="vnm"` prepares them; the call itself is eager.

    Gradients are off. What was compiled before, here or elsewhere, neither answers for this call nor changes it.

    Args:
        model: not a compiled one.
        args, kwargs: its inputs.
        options: of the backend.
        see: called with each graph while Dynamo waits for it; what it raises ends the trace.
        dynamic: as for `torch.compile`.

    Raises:
        VNMError: an annotated weight breaks its pattern.
    """
    graphs: list[Prepared] = []
    names = _layer_names(model)

    def record(gm: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        graphs.append(prepare(gm, inputs, options, names))
        if see is not None:
            see(gm, inputs, graphs[-1])
        return gm.forward

    _trace(model, args, kwargs, record, dynamic)
    return graphs


def _layer_names(model: nn.Module) -> dict[int, str]:
    """Names of what multiplies by weights, by the id of the weight; a graph after a graph break knows only a part."""
    others = {id(each.parameter): each.name for each in dense_weights(model)}
    return {**others, **{id(layer.stored): layer.name for layer in linear_layers(model)}}


def used_parameters(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> set[int]:
    """Ids of the parameters that functions get in one eager call of the model, gradients off.

    All where the call fails: a cache among the inputs may have been used up by the call before.
    """
    watched = {id(parameter) for parameter in model.parameters()}
    used: set[int] = set()

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if getattr(func, "__name__", "") != "__get__":  # .dtype, .shape: nothing is computed
                used.update(watched & {id(leaf) for leaf in tree_leaves((args, kwargs))})
            return func(*args, **(kwargs or {}))

    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"), Watch():
            model(*args, **kwargs)
    except Exception as error:
        log.debug("the model cannot be called a second time: %s", error)
        return watched
    return used


def _trace(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    backend: Callable[[fx.GraphModule, Sequence[Any]], Any],
    dynamic: bool | None,
) -> None:
    """Call the model under Dynamo, gradients off; `backend` gets its graphs and returns what runs them."""
    # Dynamo caches by code object: with one of our own, neither does an earlier compilation answer for this one, nor
    # does this one count against the recompile limit of the model.
    call = FunctionType(_call.__code__.replace(), globals())
    # What was traced before with other sizes, here or elsewhere, must not make these dynamic: the answer would depend
    # on what was asked before.
    with unwrapped_errors(VNMError), torch.no_grad(), static_sizes():
        torch.compile(call, backend=backend, dynamic=dynamic)(model, args, kwargs)


def _call(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    return model(*args, **kwargs)
