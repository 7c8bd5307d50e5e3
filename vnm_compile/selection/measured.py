"""What layers take on this machine, dense and in each pattern, as the kernels are timed that they would run."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import NamedTuple

import torch

import vnm_compile.codegen.kernels  # noqa: F401 (says which kernels there are)
from vnm_compile.codegen.measure import measure
from vnm_compile.cost import CostModel
from vnm_compile.errors import BadOption
from vnm_compile.layers import Layer
from vnm_compile.layout import Layout
from vnm_compile.problem import Failure, Problem
from vnm_compile.quantization import Quantization
from vnm_compile.spec import Spec

_COMPILED_TOGETHER = 8


class _Size(NamedTuple):
    out_features: int
    in_features: int
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, layer: Layer) -> _Size:
        out_features, in_features = layer.weight.shape
        return cls(out_features, in_features, layer.weight.dtype, layer.weight.device)


class Measured:
    """Seconds of a layer by size and pattern: those that policy "latency" decides by, kept on disk once measured.

    A pattern without a kernel on a layer's device takes what the dense layer takes. A layer that is too small for all
    patterns takes its share of the others' time, by the cost model.

    Args:
        layers: all that are asked about.
        specs: patterns that they may get, where they are at least a block of one.
        tokens: rows of the activations.
        quantization: of the values.
        progress: show a progress bar.

    Raises:
        VNMError: a kernel cannot be compiled or run, or none is there for any of the layers.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        specs: Sequence[Spec],
        tokens: int,
        quantization: Quantization | None,
        progress: bool,
    ) -> None:
        from rich.progress import track

        self._tokens = tokens
        self._sparse: dict[tuple[_Size, Spec], float] = {}
        dense: dict[_Size, list[float]] = {}
        sizes = dict.fromkeys(map(_Size.of, layers))
        wanted = [(size, spec) for size in sizes for spec in specs if spec.fits(*size[:2])]
        parts = [wanted[i : i + _COMPILED_TOGETHER] for i in range(0, len(wanted), _COMPILED_TOGETHER)]
        for part in track(parts, "measuring kernels", transient=True, disable=not progress):
            problems = [Problem(tokens, Layout(spec, *size[:2], quantization), *size[2:]) for size, spec in part]
            for (size, spec), timing in zip(part, measure(problems), strict=True):
                if isinstance(timing, Failure):
                    raise BadOption(f"the kernel of {spec} for {size[0]} x {size[1]} cannot be timed: {timing.reason}")
                if timing is not None:
                    self._sparse[size, spec] = timing.sparse
                    dense.setdefault(size, []).append(timing.dense)
        if not dense:
            raise BadOption('seconds="measured" found no kernel for any of the layers; leave it out.')
        self._dense = {size: median(each) for size, each in dense.items()}
        self._scale = sum(self._dense.values()) / sum(map(self._modelled, self._dense))

    def __call__(self, layer: Layer, spec: Spec | None) -> float:
        """The time of a layer under `spec`, dense for None."""
        size = _Size.of(layer)
        dense = self._dense[size] if size in self._dense else self._scale * self._modelled(size)
        return dense if spec is None else self._sparse.get((size, spec), dense)

    def _modelled(self, size: _Size) -> float:
        """The dense time by the cost model, in bytes."""
        model = CostModel.on(size.device, size.out_features, size.in_features, None, size.dtype)
        return model.time_at(self._tokens, sparse=False)
