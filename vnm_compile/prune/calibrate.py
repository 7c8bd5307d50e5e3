"""What calibration data says about the inputs of layers: their second moment, gathered while the model runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vnm_compile.annotate import Layer
from vnm_compile.errors import VNMError, at_layer
from vnm_compile.prune.batches import check_ids, described
from vnm_compile.prune.padding import Padding


def run_model(model: nn.Module, batch: Any) -> Any:
    """Return the model's output for a batch of calibration data: a tensor, a tuple or list of arguments, or a dict.

    Raises:
        VNMError: the model does not take the batch; what it said is the cause.
    """
    try:
        if isinstance(batch, Mapping):
            return model(**batch)
        return model(*batch) if isinstance(batch, tuple | list) else model(batch)
    except (VNMError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        said = (str(error).strip().splitlines() or [""])[0]
        raise VNMError(
            f"the model does not take the calibration batch {described(batch)}: {type(error).__name__}: {said}. "
            "A batch is a tensor, a tuple of arguments or a dict of them, as the model is called with."
        ) from error


@contextmanager
def as_evaluated(model: nn.Module) -> Iterator[None]:
    """Run the model as it will be used: without dropout, and through its modules.

    Modules that are in train mode return to it. The fused path of nn.TransformerEncoderLayer is switched off: it reads
    the weights without calling the layers, which then could not see their inputs.
    """
    training = [module for module in model.modules() if module.training]
    fused = torch.backends.mha.get_fastpath_enabled()
    try:
        for module in training:
            module.training = False
        torch.backends.mha.set_fastpath_enabled(False)
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        for module in training:
            module.training = True


@contextmanager
def calibrating(model: nn.Module) -> Iterator[None]:
    """As `as_evaluated`, and ready for any data: parts that are compiled run eagerly, indices are checked first."""

    def check(name: str, size: int) -> Callable[..., None]:
        return lambda module, args: check_ids(args[0] if args else None, size, name)

    with ExitStack() as stack:
        stack.enter_context(as_evaluated(model))
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        for name, module in model.named_modules():
            if isinstance(module, nn.Embedding):
                hook = module.register_forward_pre_hook(check(name, module.num_embeddings))
                stack.callback(hook.remove)
        yield


@contextmanager
def plain_numerics() -> Iterator[None]:
    """Compute in the dtypes that tensors have, also where the caller is inside torch.autocast."""
    with ExitStack() as stack:
        accelerator = torch.accelerator.current_accelerator()
        for device in ("cpu", *([accelerator.type] if accelerator is not None else [])):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


def execution_order(model: nn.Module, layers: Sequence[Layer], batch: Any) -> list[int]:
    """Indices of `layers` in the order in which the model first calls them; those it does not call come last."""
    seen: list[int] = []
    with ExitStack() as stack:
        for i, layer in enumerate(layers):
            hook = layer.module.register_forward_pre_hook(lambda *_, i=i: seen.append(i))
            stack.callback(hook.remove)
        stack.enter_context(torch.no_grad())
        stack.enter_context(calibrating(model))
        run_model(model, batch)
    called = list(dict.fromkeys(seen))
    return called + [i for i in range(len(layers)) if i not in seen]


def watch_inputs(
    model: nn.Module, layers: Sequence[Layer], batches: Sequence[Any], see: Callable[[int, Tensor], None]
) -> list[bool]:
    """Run the batches through the model; `see(i, x)` gets the inputs `[T, K]` of `layers[i]` each time it is called.

    x is float32, and without the positions that a batch's masks say are padding (`padding.Padding`).

    Returns:
        Whether a token reached each layer.

    Raises:
        VNMError: the model does not take a batch.
    """
    reached = [False] * len(layers)
    padding: Padding

    def hook(index: int) -> Callable[..., None]:
        def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = args[0] if args else next((v for v in kwargs.values() if isinstance(v, Tensor)), None)
            if not isinstance(given, Tensor):
                return
            x = padding.rows(given.detach(), layers[index].name)
            if len(x):
                reached[index] = True
                with plain_numerics():
                    see(index, x.float())

        return look

    with ExitStack() as stack:
        for i, layer in enumerate(layers):
            handle = layer.module.register_forward_pre_hook(hook(i), with_kwargs=True)
            stack.callback(handle.remove)
        stack.enter_context(torch.no_grad())
        stack.enter_context(calibrating(model))
        for batch in batches:
            padding = Padding(model, batch)
            run_model(model, batch)
    return reached


def second_moments(model: nn.Module, layers: Sequence[Layer], batches: Sequence[Any]) -> list[Tensor]:
    """Return the mean of `x xᵀ` over all tokens that reach each layer: float32 `[K, K]` a layer.

    Raises:
        VNMError: a layer that no token reached, inputs that are not finite, or a batch that the model does not take.
    """
    sums: list[Tensor | None] = [None] * len(layers)
    counts = [0] * len(layers)

    def gather(index: int, x: Tensor) -> None:
        total = sums[index]
        sums[index] = x.T @ x if total is None else total.addmm_(x.T, x)
        counts[index] += x.shape[0]

    watch_inputs(model, layers, batches, gather)
    moments = []
    for i, layer in enumerate(layers):
        moment = sums[i]
        if moment is None:
            raise unreached(model, layer)
        moments.append(_finite(layer, moment).div_(counts[i]))
    return moments


def input_energy(model: nn.Module, layers: Sequence[Layer], batches: Sequence[Any]) -> list[Tensor | None]:
    """Return the mean square of each input of each layer over all tokens: float32 `[K]`; None where none reached it.

    Raises:
        VNMError: inputs that are not finite, or a batch that the model does not take.
    """
    sums: list[Tensor | None] = [None] * len(layers)
    counts = [0] * len(layers)

    def gather(index: int, x: Tensor) -> None:
        total, squares = sums[index], x.square().sum(0)
        sums[index] = squares if total is None else total + squares
        counts[index] += x.shape[0]

    watch_inputs(model, layers, batches, gather)
    return [
        None if total is None else _finite(layer, total) / count
        for layer, total, count in zip(layers, sums, counts, strict=True)
    ]


def _finite(layer: Layer, total: Tensor) -> Tensor:
    if not total.isfinite().all():
        raise at_layer(layer.name, "its calibration inputs hold NaN or infinity; repair the data or the model.")
    return total


def unreached(model: nn.Module, layer: Layer) -> VNMError:
    """The error for a layer that saw no input, with the reason where it is known."""
    parent = next((m for m in model.modules() if layer.module in m.children()), None)
    if isinstance(parent, nn.MultiheadAttention):
        return at_layer(
            layer.name,
            "nn.MultiheadAttention multiplies by this weight without calling the layer, so its inputs cannot be seen; "
            f'exclude it (exclude="*.{layer.name.rpartition(".")[2]}"), or use method="magnitude" or "fisher".',
        )
    return at_layer(
        layer.name,
        "no calibration data reached it: the model did not call this layer for any token of the batches; give batches "
        "that do, or exclude the layer.",
    )


def output_error(weight: Tensor, pruned: Tensor, moment: Tensor) -> float:
    """Relative output error `||X W' - X W|| / ||X W||` for inputs with this second moment."""
    weight, change, moment = weight.detach().double(), (pruned - weight).detach().double(), moment.double()
    total = ((weight @ moment) * weight).sum()
    return float((((change @ moment) * change).sum().clamp_min(0) / total).sqrt()) if total > 0 else 0.0
