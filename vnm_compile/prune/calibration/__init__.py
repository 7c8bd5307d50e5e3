"""Calibration data, and what it says about a model's layers: for pruning by any method, and for choosing patterns."""

from vnm_compile.prune.calibration.batches import as_batches
from vnm_compile.prune.calibration.inputs import (
    execution_order,
    input_energy,
    output_error,
    second_moments,
    unreached,
    watch_inputs,
)
from vnm_compile.prune.calibration.padding import Padding
from vnm_compile.prune.calibration.running import as_evaluated, calibrating, plain_numerics, run_model

__all__ = [
    "Padding",
    "as_batches",
    "as_evaluated",
    "calibrating",
    "execution_order",
    "input_energy",
    "output_error",
    "plain_numerics",
    "run_model",
    "second_moments",
    "unreached",
    "watch_inputs",
]
