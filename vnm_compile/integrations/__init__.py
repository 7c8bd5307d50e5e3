"""Where other libraries meet this one. Nothing here imports them before they are there.

`import vnm_compile.integrations.transformers` makes transformers read and write compressed models.
"""

from __future__ import annotations

import sys
from importlib import import_module

from torch import nn


def tell(model: nn.Module) -> None:
    """Tell the transformers models in `model` that weights of theirs are compressed, or dense again."""
    for module in model.modules():
        if is_pretrained(module):
            import_module(f"{__name__}.transformers").follow_weights(module)


def is_pretrained(module: nn.Module) -> bool:
    """Whether a module is a model of transformers, which is not imported to find out."""
    modeling = sys.modules.get("transformers.modeling_utils")
    return modeling is not None and isinstance(module, modeling.PreTrainedModel)
