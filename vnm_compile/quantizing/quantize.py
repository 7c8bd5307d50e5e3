"""`vnm.quantize`: the kept values of a pruned model as integers, in place, all chosen layers or none."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from vnm_compile.annotate import Selector, set_annotation
from vnm_compile.checks import check_finite
from vnm_compile.convert import compressed_layers, patterns
from vnm_compile.errors import BadCalibration, NothingSelected, UnsupportedWeight, at_layer
from vnm_compile.format import Packed, check_pattern, kept_offsets, pack, unpack
from vnm_compile.integrations import tell
from vnm_compile.layers import Layer, check_module
from vnm_compile.layout import Layout
from vnm_compile.memory import return_freed_memory
from vnm_compile.prune.calibration import as_batches, output_error, plain_numerics, second_moments
from vnm_compile.prune.methods.layer_by_layer import blocks_in_order
from vnm_compile.prune.pruned import running_with, uninterrupted
from vnm_compile.quantization import Quantization, spread_scales, store_levels
from vnm_compile.quantizing.descent import descend
from vnm_compile.quantizing.report import LayerQuantized, QuantizeReport
from vnm_compile.quantizing.scales import choose_scales, grouped, nearest
from vnm_compile.spec import Spec
from vnm_compile.tensor import VNMTensor


def quantize(
    model: nn.Module,
    values: str = "int8",
    group: int | str = 64,
    *,
    activations: str | None = None,
    calibration: Iterable[Any] | None = None,
    include: Iterable[Selector] | Selector | None = None,
    exclude: Iterable[Selector] | Selector | None = None,
    progress: bool = True,
) -> QuantizeReport:
    """Store what the V:N:M weights of `model` keep as integers with scales, in place, compressed.

    Prune first, then quantise (arXiv 2405.20935): a mask that is chosen by magnitudes sees them whole. Without data
    every value is rounded to the nearest level, at scales chosen by search. With data, values make up for each other's
    rounding, so that the layers' outputs change least (`vnm_compile.quantizing.descent`); blocks are quantised in the
    order in which they run, each on the inputs that those before it produce.

    Args:
        model: its layers that follow a V:N:M pattern, annotated, found or compressed already, are quantised; on an
            error nothing of it is changed.
        values: "int8" or "int4".
        group: kept values of a row that share a scale: 32, 64, 128 or "row". Scales have the weights' dtype.
        activations: "int8" to round the layers' inputs, too, where they are computed: each token's to 127 levels either
            way of its largest magnitude. With many tokens CPUs that multiply bytes are up to twice as fast with it;
            gradients take rounding for the identity.
        calibration: batches of model inputs, as for `vnm.sparsify`; a few hundred sentences do.
        include, exclude: which layers, as for `vnm.annotate`.
        progress: show a progress bar while it runs.

    Returns:
        What it did to each layer. Their weights are `VNMTensor` parameters that do not require grad.

    Raises:
        VNMError: no layer follows a pattern, one breaks its own, holds NaN or infinity, is quantised already or cannot
            be compressed; or calibration data that is empty, not finite, no model input, or does not reach a layer.
    """
    from rich.progress import Progress  # compiling does not need it

    check_module(model)
    model = getattr(model, "_orig_mod", model)
    quantization = Quantization.of(values, group, activations)
    chosen = _chosen(model, include, exclude)
    batches = as_batches(calibration)
    if calibration is not None and not batches:
        raise BadCalibration("the calibration data is empty (a generator that was used up?); give [batch, ...].")
    done: list[tuple[Layer, VNMTensor]] = []
    rows: dict[str, LayerQuantized] = {}
    with Progress(disable=not progress) as bar, torch.inference_mode(False):
        task = bar.add_task(f"quantising to {quantization}", total=len(chosen))
        for block in blocks_in_order(model, chosen, batches):
            moments: list[Tensor | None] = [None] * len(block)
            if batches:
                with running_with([layer for layer, _ in done], [weight.to_dense for _, weight in done]):
                    moments = list(second_moments(model, [layer for layer, _ in block], batches))
            for (layer, spec), moment in zip(block, moments, strict=True):
                with torch.no_grad(), plain_numerics():
                    weight, rows[layer.name] = _quantised(layer, spec, quantization, moment)
                done.append((layer, weight))
                bar.advance(task)
    with uninterrupted():
        for layer, weight in done:
            stored = weight.t() if layer.transposed else weight
            layer.module.weight = nn.Parameter(stored, requires_grad=False)
            set_annotation(layer.module, weight.spec, layer.name)
        tell(model)
    return_freed_memory()
    return QuantizeReport(rows[layer.name] for layer, _ in chosen)


def _chosen(
    model: nn.Module,
    include: Iterable[Selector] | Selector | None,
    exclude: Iterable[Selector] | Selector | None,
) -> list[tuple[Layer, Spec]]:
    """The layers to quantise, and their patterns, checked."""
    chosen = patterns(model, None, include, exclude)
    if not chosen:
        raise NothingSelected(
            "no linear layer of the model follows a V:N:M pattern; vnm.sparsify(model, ...) makes one."
            if not compressed_layers(model)
            else "no compressed layer is among the chosen ones."
        )
    for layer, spec in chosen:
        stored = layer.stored
        if isinstance(stored, VNMTensor) and stored.quantization is not None:
            raise at_layer(
                layer.name,
                f"its values are {stored.quantization} already; call vnm.decompress_model(model) first, or exclude it.",
                UnsupportedWeight,
            )
        if not isinstance(stored, VNMTensor):
            check_pattern(layer.weight, spec, layer.name)
        check_finite(layer)
    return chosen


def _quantised(
    layer: Layer, spec: Spec, quantization: Quantization, moment: Tensor | None
) -> tuple[VNMTensor, LayerQuantized]:
    """One layer's weight, quantised, and the record of what that did to it."""
    before = layer.weight.detach()
    packed = before.packed if isinstance(before, VNMTensor) else pack(before, spec, layer.name)
    out_features, in_features = before.shape
    floats = Layout(spec, out_features, in_features)
    weight = quantised_weight(packed, floats, quantization, moment)
    layout = weight.layout_of_arrays
    dense, after = unpack(packed, floats), unpack(weight.packed, layout)
    total = dense.double().norm()
    row = LayerQuantized(
        layer.name,
        (out_features, in_features),
        str(spec),
        str(quantization),
        floats.nbytes(dense.dtype),
        layout.nbytes(dense.dtype),
        float((after.double() - dense.double()).norm() / total) if total > 0 else 0.0,
        None if moment is None else output_error(dense, after, moment.to(dense.device)),
    )
    return weight, row


def quantised_weight(
    packed: Packed, floats: Layout, quantization: Quantization, moment: Tensor | None = None
) -> VNMTensor:
    """The weight whose arrays with finite floats are given, with values rounded as `quantise_packed` does."""
    layout = replace(floats, quantization=quantization)
    with torch.no_grad(), plain_numerics():
        return VNMTensor._wrap(quantise_packed(packed, floats, layout, moment), layout, False)


def quantise_packed(packed: Packed, floats: Layout, layout: Layout, moment: Tensor | None = None) -> Packed:
    """Arrays whose values are quantised, given those of a weight with floats.

    Args:
        packed, floats: the weight.
        layout: the same with quantised values.
        moment: `[K, K]` of the layer's inputs, to round so that outputs change least; None: to the nearest.
    """
    quantization, dtype = layout.quantization, packed.values.dtype
    assert quantization is not None, "the layout says how"
    kept = packed.values.to(torch.promote_types(dtype, torch.float32))
    offsets = kept_offsets(packed.metadata, packed.columns, layout)
    weights = None
    if moment is not None:
        group = torch.arange(layout.groups, device=kept.device).view(1, 1, -1, 1) * layout.spec.m
        place = (group + offsets).clamp_max(layout.in_features - 1).reshape(kept.shape)
        weights = moment.diagonal().to(kept)[place]
    scales = choose_scales(kept, quantization, dtype, weights)
    if moment is None:
        levels = nearest(grouped(kept, quantization), scales, quantization).flatten(1)[:, : layout.kept]
    else:
        spread = spread_scales(scales.to(kept.dtype), quantization, layout.kept)
        dense, by_place = (unpack(packed.replaced(0, each), floats) for each in (kept, spread))
        whole = kept.new_zeros(layout.rows, layout.groups * layout.spec.m)
        whole[: layout.out_features, : layout.in_features] = descend(dense, by_place, moment.to(kept), quantization)
        levels = whole.view(*offsets.shape[:3], layout.spec.m).gather(3, offsets).reshape(kept.shape)
    return Packed(store_levels(levels.to(torch.int8), quantization), *packed[1:3], scales)
