"""Where other libraries meet this one. Nothing here imports them before they are there.

`import vnm_compile.integrations.transformers` makes transformers read and write compressed models.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any

from torch import nn


def as_pretrained(model: nn.Module) -> Any:
    """`model` where it is one of transformers, ready to be saved by its `save_pretrained`; else None."""
    if not _is_pretrained(model):
        return None
    tell(model)
    return model


def tell(model: nn.Module) -> None:
    """Tell the transformers models in `model` that weights of theirs are compressed, or dense again."""
    for module in model.modules():
        if _is_pretrained(module):
            import_module(f"{__name__}.transformers").follow_weights(module)


def _is_pretrained(module: nn.Module) -> bool:
    modeling = sys.modules.get("transformers.modeling_utils")
    return modeling is not None and isinstance(module, modeling.PreTrainedModel)
