"""Training into the pattern: masks that tighten while a model trains, and exact V:N:M weights at the end."""

from typing import Any

from vnm_compile.train.distillation import Distillation, Distilled, Terms
from vnm_compile.train.finalize import finalize
from vnm_compile.train.recipes import SRSTE, FixedMask, MaskDecay, Recipe, StructureDecay, ThreeStagedLoRA
from vnm_compile.train.training import Training, begin
from vnm_compile.train.values import compress_for_training

__all__ = [
    "SRSTE",
    "Distillation",
    "DistillationTrainer",
    "Distilled",
    "FixedMask",
    "MaskCallback",
    "MaskDecay",
    "Recipe",
    "StructureDecay",
    "Terms",
    "ThreeStagedLoRA",
    "Training",
    "begin",
    "compress_for_training",
    "finalize",
]


def __getattr__(name: str) -> Any:
    if name == "MaskCallback":  # needs transformers
        from vnm_compile.train.trainer import MaskCallback

        return MaskCallback
    if name == "DistillationTrainer":
        from vnm_compile.train.trainer_with_teacher import DistillationTrainer

        return DistillationTrainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
