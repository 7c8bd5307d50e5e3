"""How a model runs on calibration data: eagerly, as it will be used, in the dtypes that it has."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from vnm_compile.errors import BadCalibration, VNMError
from vnm_compile.prune.calibration.batches import check_ids, described
from vnm_compile.prune.calibration.hooks import hooked


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
        raise BadCalibration(
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
    named = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Embedding)]

    def check(i: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        name, module = named[i]
        check_ids(args[0] if args else None, module.num_embeddings, name)

    embeddings = [module for _, module in named]
    with as_evaluated(model), torch.compiler.set_stance("force_eager"), hooked(embeddings, check):
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
