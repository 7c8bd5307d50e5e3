"""The answer for one layer: whether it runs sparse, why, and what that is worth."""

from __future__ import annotations

from dataclasses import dataclass

COMPRESSED = "stored compressed"
"""How the reason of a layer begins whose weight is kept compressed: nothing dense is in memory."""


@dataclass(frozen=True)
class LayerReport:
    """What became of one linear, or of something else that multiplies by a weight (experts, a convolution).

    Attributes:
        name: qualified name of the layer.
        shape: `[out_features, in_features]`; the shape as stored of what is no linear; None where it is not known.
        spec: its pattern as text, or None.
        density: share of the weights that the pattern keeps; 1.0 without one.
        dense_bytes, stored_bytes: bytes of the weight dense, and as the compiled model reads it.
        decision: "sparse", "dense", or "not run" for a layer that the given inputs did not reach.
        reason: why, in one line.
        joined: names of the layers that it is computed together with.
        tokens: rows of its input.
        sparse_seconds, dense_seconds: what was measured, where something was.
        limit: upper limit of the speed-up at these tokens, from `CostModel`.
        crossover: tokens from which arithmetic bounds the sparse kernel, from `CostModel`.
        linear: whether it is the weight of a linear layer; experts and convolutions are not.
    """

    name: str
    shape: tuple[int, ...] | None
    spec: str | None
    density: float
    dense_bytes: int | None
    stored_bytes: int | None
    decision: str
    reason: str
    joined: tuple[str, ...] = ()
    tokens: int | None = None
    sparse_seconds: float | None = None
    dense_seconds: float | None = None
    limit: float | None = None
    crossover: float | None = None
    linear: bool = True

    @property
    def resident_bytes(self) -> int | None:
        """Bytes that the weight takes in memory while the compiled model lives. A dense weight stays beside what was
        packed from it: the model still owns it, and may write to it."""
        if self.dense_bytes is None or self.reason.startswith(COMPRESSED):
            return self.stored_bytes
        return self.dense_bytes + ((self.stored_bytes or 0) if self.decision == "sparse" else 0)

    @property
    def speedup(self) -> float | None:
        """Measured dense time over measured sparse time, or None where nothing was measured."""
        return self.dense_seconds / self.sparse_seconds if self.dense_seconds and self.sparse_seconds else None
