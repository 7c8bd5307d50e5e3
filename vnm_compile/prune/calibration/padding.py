"""Which positions of a batch are data and which only fill up a rectangle: padding must not count in statistics."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vnm_compile.errors import BadCalibration

# Names under which models take masks. In the second kind, torch's own, what is set is left out.
_KEEPING = {"attention_mask": 0, "encoder_attention_mask": 0, "decoder_attention_mask": 1}
_DROPPING = {"key_padding_mask": 0, "src_key_padding_mask": 0, "tgt_key_padding_mask": 1}
_SECOND_STREAM = ("decoder_input_ids", "decoder_inputs_embeds", "labels", "tgt")
_DECODER = re.compile(r"(^|\.)decoder(\.|$)")
_CROSS = re.compile(r"(enc|cross|src)[^.]*att[^.]*\.(.*\.)?(k|v|key|value)(_proj)?$", re.IGNORECASE)


class Padding:
    """The real positions of one batch, by its masks.

    A model with an encoder and a decoder has two kinds of positions. Which of them a layer sees is known by the shape
    of its input, and where both have the same, by its name.
    """

    def __init__(self, model: nn.Module, batch: Any) -> None:
        arguments = _arguments(model, batch)
        masks: list[Tensor | None] = [None, None]
        for name, stream in _KEEPING.items():
            if isinstance(arguments.get(name), Tensor):
                masks[stream] = real_positions(arguments[name], name)
        for name, stream in _DROPPING.items():
            mask = arguments.get(name)
            if isinstance(mask, Tensor):
                masks[stream] = mask == 0  # False, or nothing added to the scores
        given = (arguments.get(name) for name in _SECOND_STREAM)
        second = next((value for value in given if isinstance(value, Tensor) and value.dim() >= 2), None)
        encoder_decoder = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", "tgt" in arguments))
        if encoder_decoder and masks[1] is None and second is not None:
            masks[1] = torch.ones(second.shape[:2], dtype=torch.bool, device=second.device)
        self.streams = masks

    def rows(self, x: Tensor, layer: str) -> Tensor:
        """The real positions of a layer's input `[..., K]`, one a row: `[T, K]`; all where no mask fits its shape."""
        first, second = self.streams
        decoder = second is not None and _DECODER.search(layer) and not _CROSS.search(layer)
        for mask in (second, first) if decoder else (first, second):
            chosen = None if mask is None else _select(x, mask.to(x.device))
            if chosen is not None:
                return chosen.reshape(-1, x.shape[-1])
        return x.reshape(-1, x.shape[-1])

    def clear(self, output: Tensor) -> Tensor:
        """An output of the model, `[batch, positions, ...]`, with zeros at its padding."""
        for mask in reversed(self.streams):
            if mask is not None and output.shape[:2] == mask.shape:
                shape = (*mask.shape, *(1 for _ in output.shape[2:]))
                return output * mask.to(output.device).view(shape).to(output.dtype)
        return output


def real_positions(mask: Tensor, name: str = "attention_mask") -> Tensor:
    """Which positions a mask leaves real: bool `[batch, positions]`.

    Args:
        mask: `[batch, positions]`, non-zero where real; or `[batch, (heads,) queries, keys]`: boolean or 0 and 1, set
            where a query sees a key, or added to the scores (0, or a large negative number).
        name: of the argument, for messages.

    Raises:
        VNMError: it has another number of dimensions, or leaves nothing.
    """
    if mask.dim() not in (2, 3, 4):
        raise BadCalibration(
            f"{name} has shape {list(mask.shape)}; expected [batch, positions] or [batch, 1, queries, keys]."
        )
    seen = mask > 0
    if mask.is_floating_point() and (bool((mask < 0).any()) or not bool(seen.any())):
        seen = mask > -1e3  # added to scores: what is small is a bias, what is large hides a key
    if mask.dim() > 2:
        seen = seen.any(1) if mask.dim() == 4 else seen  # [batch, queries, keys]
        # Queries that are padding themselves may be let see everything, lest their softmax has nothing to sum over.
        # They say nothing about keys, unless the last query also sees all: then nothing is padding.
        everything = seen.all(2)
        telling = ~everything | everything[:, -1:]
        seen = (seen & telling.unsqueeze(2)).any(1)
    if mask.numel() and not bool(seen.any()):
        raise BadCalibration(
            f"{name} hides every position of a calibration batch; expected 1 (or True) at real tokens."
        )
    return seen


def _select(x: Tensor, mask: Tensor) -> Tensor | None:
    """The entries of `x` at real positions, or None where its shape does not show its positions."""
    batch, length = mask.shape
    lead = tuple(x.shape[:-1])
    if lead[:2] == (batch, length):
        return x[mask]
    if lead in ((batch * length,), (1, batch * length)):
        return x.reshape(batch * length, -1)[mask.flatten()]
    if lead == (length, batch):
        return x[mask.T]
    if len(lead) == 3 and (lead[0], lead[2]) == (batch, length):  # heads between
        return x.transpose(1, 2)[mask]
    return None


def _arguments(model: nn.Module, batch: Any) -> Mapping[str, Any]:
    """The model's arguments by name, as far as its signature tells."""
    if isinstance(batch, Mapping):
        return batch
    args = tuple(batch) if isinstance(batch, tuple | list) else (batch,)
    try:
        return inspect.signature(model.forward).bind_partial(*args).arguments
    except (TypeError, ValueError):
        return {}
