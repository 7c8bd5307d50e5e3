"""`vnm.sparsify`: prune a model into the pattern, in place, all chosen layers or none."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from vnm_compile.annotate import Layer, Selector, select_layers, set_annotation
from vnm_compile.checks import check_usable
from vnm_compile.errors import VNMError, at_layer
from vnm_compile.inventory import others
from vnm_compile.memory import return_freed_memory
from vnm_compile.prune.batches import as_batches
from vnm_compile.prune.calibrate import execution_order, output_error, plain_numerics, second_moments
from vnm_compile.prune.fisher import Fisher, prune_by_fisher
from vnm_compile.prune.held_out import held_out_errors
from vnm_compile.prune.outcome import LayerPruned
from vnm_compile.prune.permute import permuted
from vnm_compile.prune.project import project
from vnm_compile.prune.pruned import Pruned, running_pruned, slabs, uninterrupted, write_all
from vnm_compile.prune.resume import PrunedLayers
from vnm_compile.prune.second_order import DAMPING, second_order
from vnm_compile.prune.sparsify_report import SparsifyReport
from vnm_compile.spec import Spec
from vnm_compile.tensor import VNMTensor

if TYPE_CHECKING:
    from rich.progress import Progress

Norm = Literal["l1", "l2"]
METHODS = {
    "magnitude": "keep the largest weights",
    "wanda": "keep the largest weights times the norm of their inputs; needs calibration data",
    "second_order": "change the layers' outputs least, and make up for what is dropped; needs calibration data",
    "fisher": "change the loss least, in steps with retraining; needs calibration data",
}
"""The methods of `sparsify`, and what each does."""


def sparsify(
    model: nn.Module,
    spec: Spec | str | Mapping[Selector, Spec | str | None],
    method: str | Fisher = "magnitude",
    include: Iterable[Selector] | Selector | None = None,
    exclude: Iterable[Selector] | Selector | None = None,
    calibration: Iterable[Any] | None = None,
    norm: Norm = "l1",
    damping: float = DAMPING,
    held_out: Iterable[Any] | None = None,
    checkpoint: str | Path | None = None,
    permute: bool = False,
    sequential: bool = True,
    progress: bool = True,
) -> SparsifyReport:
    """Prune the linears of `model` into a V:N:M pattern, in place, and annotate them.

    With "wanda" and "second_order" the layers are pruned block by block in the order in which they run; the data is
    passed over once a block, and the second moments of one block are held at a time (4 K squared bytes a layer). Data
    runs through the model in eval mode, eagerly, without gradients. Positions that a batch's attention_mask (or torch's
    key_padding_mask) says are padding do not count.

    The model is written to when all is done. Until then the pruned weights are held packed: beside the statistics, a
    run takes about the share of the weights that the pattern keeps.

    Args:
        model: its selected weights are written to; on an error nothing of it is changed.
        spec, include, exclude: which layers and patterns, as for `vnm.annotate`.
        method: a key of `METHODS`. "magnitude" is VENOM's (arXiv 2310.02065, section 5); "wanda" scores as arXiv
            2306.11695 does; "second_order" is described in `vnm_compile.prune.second_order`; "fisher" is VENOM's in
            one step, and a `vnm.prune.Fisher` says how many steps, of which loss, with what retraining.
        calibration: an iterable of batches of model inputs, a tensor, a tuple or a dict each; a single tensor or dict
            is one batch.
        norm: what is summed over a block by "magnitude" and "wanda": the scores ("l1") or their squares ("l2").
        damping: of the second moments, as a share of their mean diagonal.
        held_out: batches that the calibration data does not hold, for the report to measure the layers' errors on.
        checkpoint: a directory in which finished layers are stored, and from which a run that was interrupted takes
            them up again; not for "fisher", whose layers are pruned together.
        permute: reorder channels first, wherever their order is free: the model computes what it did, and keeps more of
            its importance under the pattern (`vnm_compile.prune.permute`). Needs calibration data for every method, of
            which the first batch says how channels run through the model, and SciPy. Weights of other layers, biases,
            norms and embeddings move along. A run that goes on from its `checkpoint` searches again and finds the same.
        sequential: prune a block on the inputs that the blocks pruned before it produce, which keeps the whole model
            closer to the dense one; False: on those of the dense model, which keeps each layer closer to itself. For
            "wanda" and "second_order".
        progress: show a progress bar while it runs.

    Returns:
        What is left of each layer, and what else of the model multiplies by weights and stays dense.

    Raises:
        VNMError: an unknown method, no layer to prune, a weight that is compressed already, holds NaN or cannot be
            written to, calibration data that is missing, empty, not finite, no model input, or does not reach a layer,
            a checkpoint of another run, or, with `permute`, a model that torch.export cannot export.
    """
    from rich.progress import Progress  # compiling does not need it

    model = getattr(model, "_orig_mod", model)
    name = "fisher" if isinstance(method, Fisher) else method
    _check_arguments(name, norm, damping, checkpoint)
    selected = select_layers(model, spec, include, exclude)
    if not selected:
        raise VNMError("no layer of the model is large enough for this pattern; choose a smaller V or name the layers.")
    layers = [layer for layer, _ in selected]
    _check(layers)
    batches = _batches(calibration, name, permute)
    unseen = None if held_out is None else as_batches(held_out, "held_out")
    fisher = method if isinstance(method, Fisher) else Fisher()
    settings = {
        "method": name,
        "norm": norm,
        "damping": damping,
        "permute": permute,
        "sequential": sequential,
        "layers": [[each.name, str(s)] for each, s in selected],
    }
    with ExitStack() as last, _own_modes(layers):
        with (
            Progress(disable=not progress) as bar,
            permuted(model, selected, batches, name, bar) if permute else _not_permuted() as shares,
            _as_it_was(model, layers, fisher) if name == "fisher" else nullcontext() as dense,
        ):
            if name == "fisher":
                results = prune_by_fisher(model, selected, batches, fisher, bar)
                pruned = results if results is not None else _taken_out(selected, dense or [])
            else:
                store = PrunedLayers(checkpoint, settings, batches) if checkpoint is not None else None
                blocks = _blocks(model, selected, batches)
                pruned = _prune_by_layers(model, blocks, batches, name, norm, damping, sequential, store, bar)
            by_layer = {id(each.layer): each for each in pruned}
            pruned = [by_layer[id(layer)] for layer in layers]
            errors = [None] * len(layers) if unseen is None else held_out_errors(model, pruned, unseen)
            last.enter_context(uninterrupted())
            write_all(pruned)
        for layer, layer_spec in selected:
            set_annotation(layer.module, layer_spec, layer.name)
    rows = [
        _row(each, error, shares.get(each.layer.name, (None, None))) for each, error in zip(pruned, errors, strict=True)
    ]
    del pruned, by_layer, dense
    return_freed_memory()
    return SparsifyReport(name, rows, others(model, {id(layer.module) for layer in layers}))


def _prune_by_layers(
    model: nn.Module,
    blocks: Iterable[Sequence[tuple[Layer, Spec]]],
    batches: Sequence[Any],
    method: str,
    norm: Norm,
    damping: float,
    sequential: bool,
    store: PrunedLayers | None,
    bar: Progress,
) -> list[Pruned]:
    """Prune block by block; the model keeps its weights."""
    blocks = list(blocks)
    task = bar.add_task(f"pruning by {method}", total=sum(map(len, blocks)))
    done: list[Pruned] = []
    for block in blocks:
        stored = [store.load(*pair) if store else None for pair in block]
        open_layers = [layer for (layer, _), found in zip(block, stored, strict=True) if found is None]
        moments: list[Tensor | None] = [None] * len(open_layers)
        if method != "magnitude" and open_layers:
            with running_pruned(done if sequential else []):
                moments = list(second_moments(model, open_layers, batches))
        for (layer, spec), found in zip(block, stored, strict=True):
            if found is None:
                with torch.no_grad(), plain_numerics():
                    each = _prune(layer, spec, moments.pop(0), method, norm, damping)
                if store:
                    store.save(layer, spec, each.weight(), each.output_error)
            else:
                each = Pruned.of(layer, spec, found[0], layer.weight.detach(), found[1])
            done.append(each)
            bar.advance(task)
    return done


def _prune(layer: Layer, spec: Spec, moment: Tensor | None, method: str, norm: Norm, damping: float) -> Pruned:
    """Prune one layer."""
    weight = layer.weight.detach()
    if method == "second_order" and moment is not None:
        new = second_order(weight, moment, spec, damping)
        return Pruned.of(layer, spec, new, weight, output_error(weight, new, moment))
    pruned = Pruned(layer, spec)
    scale = None if moment is None else moment.diagonal().sqrt()
    for rows in slabs(weight, spec):
        scores = weight[rows].float().abs()
        scores = scores if scale is None else scores * scale
        pruned.add(rows, weight[rows] * project(scores if norm == "l1" else scores.square(), spec), weight[rows])
    if moment is not None:
        pruned.output_error = output_error(weight, pruned.weight(), moment)
    return pruned


def _row(pruned: Pruned, unseen: float | None, importance: Sequence[float | None]) -> LayerPruned:
    out_features, in_features = pruned.layer.weight.shape
    return LayerPruned(
        pruned.layer.name,
        (out_features, in_features),
        str(pruned.spec),
        pruned.retained,
        pruned.output_error,
        unseen,
        *importance,
    )


def _check_arguments(method: Any, norm: str, damping: Any, checkpoint: str | Path | None) -> None:
    if not isinstance(method, str) or method not in METHODS:
        raise VNMError(f"unknown method {method!r}; there are {', '.join(METHODS)}.")
    if norm not in ("l1", "l2"):
        raise VNMError(f"norm={norm!r}; it takes 'l1' or 'l2'.")
    if not isinstance(damping, int | float) or not 0 <= damping < float("inf"):
        raise VNMError(f"damping={damping!r}; it is a share of the mean diagonal, such as {DAMPING}.")
    if method == "fisher" and checkpoint is not None:
        raise VNMError(
            'checkpoint= is for methods that prune layer by layer; "fisher" prunes all layers in every step. '
            "Save the model in the retrain callback instead."
        )


def _batches(calibration: Iterable[Any] | None, method: str, permute: bool) -> list[Any]:
    batches = as_batches(calibration)
    if (method != "magnitude" or permute) and not batches:
        found = "there is none" if calibration is None else "it is empty (a generator that was used up?)"
        what = f'method="{method}"' if method != "magnitude" else "permute=True"
        raise VNMError(f"{what} needs calibration data, and {found}; give calibration=[batch, ...].")
    return batches


def _blocks(
    model: nn.Module, selected: Sequence[tuple[Layer, Spec]], batches: Sequence[Any]
) -> Iterator[list[tuple[Layer, Spec]]]:
    """The layers in the order in which they run, those of one repeated block (`layers.3`) together."""
    order: Sequence[int] = range(len(selected))
    if batches:
        order = execution_order(model, [layer for layer, _ in selected], batches[0])
    block: list[tuple[Layer, Spec]] = []
    for i in order:
        if block and _block_name(block[0][0].name) != _block_name(selected[i][0].name):
            yield block
            block = []
        block.append(selected[i])
    yield block


def _block_name(name: str) -> str:
    """A layer's name up to its first number: `encoder.layer.3`; the whole name where there is none."""
    found = re.match(r"(?:.*?\.)?\d+(?=\.|$)", name)
    return found.group() if found else name


@contextmanager
def _not_permuted() -> Iterator[dict[str, tuple[float, float]]]:
    """What `permuted` yields where nothing is permuted."""
    yield {}


@contextmanager
def _as_it_was(model: nn.Module, layers: Sequence[Layer], fisher: Fisher) -> Iterator[list[Tensor]]:
    """Yield the layers' dense weights where steps write to them, and undo on an error what steps and retraining did."""
    before = [] if fisher.in_one_step else [layer.weight.detach().clone() for layer in layers]
    state = {} if fisher.retrain is None else {name: value.clone() for name, value in model.state_dict().items()}
    try:
        yield before
    except BaseException:
        with torch.no_grad():
            if state:
                model.load_state_dict(state)
            for layer, weight in zip(layers, before, strict=False):
                layer.weight.copy_(weight)
        raise


def _taken_out(selected: Sequence[tuple[Layer, Spec]], dense: Sequence[Tensor]) -> list[Pruned]:
    """The pruned weights that the layers hold, which get their dense ones back."""
    pruned = []
    with torch.no_grad():
        for (layer, spec), before in zip(selected, dense, strict=True):
            pruned.append(Pruned.of(layer, spec, layer.weight.detach(), before))
            layer.weight.copy_(before)
    return pruned


@contextmanager
def _own_modes(layers: Sequence[Layer]) -> Iterator[None]:
    """Leave the caller's inference mode, in which no gradient can be taken; weights that were made in it stay in it."""
    inference = torch.is_inference_mode_enabled() and any(layer.weight.is_inference() for layer in layers)
    with torch.inference_mode(inference):
        yield


def _check(layers: Sequence[Layer]) -> None:
    for layer in layers:
        if isinstance(layer.stored, VNMTensor):
            raise at_layer(layer.name, "its weight is compressed already; call vnm.decompress_model(model) first.")
    check_usable(layers, written=True)
    for layer in layers:
        # NaN is passed on by both; isfinite() would make copies of the weight.
        low, high = torch.aminmax(layer.weight.detach())
        if not bool(low.isfinite() & high.isfinite()):
            raise at_layer(layer.name, "its weight holds NaN or infinity; repair or exclude the layer.")
