"""How long layers take, dense and in each pattern: by the cost model, or as it was measured, here or by the user."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from vnm_compile.cost import CostModel
from vnm_compile.errors import BadOption
from vnm_compile.layers import Layer
from vnm_compile.layout import Layout
from vnm_compile.quantization import Quantization
from vnm_compile.selection.measured import Measured
from vnm_compile.spec import Spec

Seconds = Callable[[int, int, Spec | None], float]
"""`seconds(out_features, in_features, spec)`: measured time of a linear; dense for spec None."""


class Times:
    """The time of a layer, dense or in a pattern; layers of one size are asked for once.

    Attributes:
        dense: the time of all layers together, dense.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        tokens: int,
        seconds: Seconds | Measured | None,
        quantization: Quantization | None = None,
    ) -> None:
        self._tokens, self._seconds, self._quantization = tokens, seconds, quantization
        self._known: dict[tuple[int, int, torch.dtype, torch.device, Spec | None], float] = {}
        self.dense = sum(self(layer, None) for layer in layers)

    def __call__(self, layer: Layer, spec: Spec | None) -> float:
        """The time of a layer under `spec`, dense for None.

        Raises:
            VNMError: the user's function returned no positive number.
        """
        weight = layer.weight
        out_features, in_features = weight.shape
        key = out_features, in_features, weight.dtype, weight.device, spec
        if key not in self._known:
            if isinstance(self._seconds, Measured):
                time = self._seconds(layer, spec)
            elif self._seconds is not None:
                time = self._seconds(out_features, in_features, spec)
            else:
                layout = Layout(spec, out_features, in_features, self._quantization) if spec is not None else None
                model = CostModel.on(weight.device, out_features, in_features, layout, weight.dtype)
                time = model.time_at(self._tokens, sparse=True)
            if not isinstance(time, int | float) or not time > 0:
                raise BadOption(
                    f"seconds({out_features}, {in_features}, {spec}) returned {time!r}; it must be positive."
                )
            self._known[key] = time
        return self._known[key]
