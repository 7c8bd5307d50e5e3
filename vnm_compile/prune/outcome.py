"""What pruning did to each layer, as records."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LayerPruned:
    """One pruned layer.

    Attributes:
        name: qualified name.
        shape: `[out_features, in_features]`.
        spec: its pattern as text.
        retained: share of the weight's L1 norm that stood in the kept places, before any update of the weights.
        output_error: `||X W' - X W|| / ||X W||` on the calibration data; None where it was not measured.
        held_out_error: the same on the held-out data, for the inputs of the dense model; None without such data.
        importance_before: with `permute`, the share of its importance that the best mask keeps in the model's own order
            of channels; None without.
        importance_after: the same in the order found.
    """

    name: str
    shape: tuple[int, int]
    spec: str
    retained: float
    output_error: float | None = None
    held_out_error: float | None = None
    importance_before: float | None = None
    importance_after: float | None = None


@dataclass(frozen=True)
class LayerLeft:
    """What multiplies by a weight and was left dense: a linear, experts, a convolution.

    Attributes:
        name: qualified name.
        shape: of the weight as it is stored.
        reason: why, in one line.
    """

    name: str
    shape: tuple[int, ...]
    reason: str
