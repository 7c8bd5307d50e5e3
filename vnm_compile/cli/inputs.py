"""Calibration data from a file: text, cut into passages of tokens, or model inputs as tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from vnm_compile.cli.directory import load_tokenizer
from vnm_compile.errors import BadFile

_PICKLES = (".pt", ".pth", ".bin", ".pkl", ".pickle", ".npy", ".npz", ".ckpt")

Batch = dict[str, Tensor]


def load_batches(file: Path, directory: Path, model: nn.Module, samples: int, length: int, size: int) -> list[Batch]:
    """Return batches of model inputs from `file`, drawn at random with a fixed seed.

    Args:
        file: UTF-8 text, whose passages become `input_ids`; or `.safetensors`, in which the tensors are named as the
            model's arguments and hold one sample a row.
        directory: of the model, for its tokenizer.
        model: what the inputs are for.
        samples: passages, or rows, that are taken at most.
        length: tokens a passage.
        size: samples a batch.

    Raises:
        VNMError: the file cannot be read, or holds less than one sample.
    """
    if not file.is_file():
        raise BadFile(f"there is no calibration file {file}.")
    if file.suffix in _PICKLES:
        raise BadFile(f"{file} may be a pickle, which is not read; give text or a .safetensors file of model inputs.")
    data = _tensors(file) if file.suffix == ".safetensors" else _passages(file, directory, model, length)
    count = len(next(iter(data.values())))
    chosen = torch.randperm(count, generator=torch.Generator("cpu").manual_seed(0), device="cpu")[:samples]
    return [{name: value[part] for name, value in data.items()} for part in chosen.split(size)]


def example_inputs(model: nn.Module, batch: int, length: int, file: Path | None = None) -> Batch:
    """Inputs to run a model with: random ones, or the first rows of a file.

    Args:
        model: of transformers.
        batch: sequences, or images.
        length: tokens a sequence.
        file: `.safetensors`, in which the tensors are named as the model's arguments.

    Raises:
        VNMError: the file cannot be read, or the model takes what cannot be made up.
    """
    if file is not None:
        if not file.is_file():
            raise BadFile(f"there is no file of inputs {file}.")
        return {name: value[:batch] for name, value in _tensors(file).items()}
    config: Any = model.config
    name, generator = str(getattr(model, "main_input_name", "")), torch.Generator("cpu").manual_seed(0)
    text = config.get_text_config()
    if name == "input_ids":
        length = min(length, getattr(text, "max_position_embeddings", None) or length)
        tokens = torch.randint(0, text.vocab_size, (batch, length), generator=generator, device="cpu")
        made = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        if getattr(config, "is_encoder_decoder", False):
            made["decoder_input_ids"] = tokens
        return made
    size = getattr(config, "image_size", None)
    if name == "pixel_values" and size is not None:
        height, width = (size, size) if isinstance(size, int) else size
        shape = (batch, getattr(config, "num_channels", 3), height, width)
        dtype = next(model.parameters()).dtype
        return {"pixel_values": torch.randn(shape, generator=generator, device="cpu", dtype=torch.float32).to(dtype)}
    raise BadFile(
        f"a {type(model).__name__} takes {name or 'inputs'} that cannot be made up; give them by --inputs "
        "FILE.safetensors, in which the tensors are named as the model's arguments."
    )


def _tensors(file: Path) -> Batch:
    try:
        tensors = load_file(file)
    except Exception as error:  # safetensors has exceptions of its own
        raise BadFile(f"{file} cannot be read as a safetensors file of model inputs: {error}.") from error
    lengths = {name: len(value) if value.dim() else 0 for name, value in tensors.items()}
    if not lengths or len(set(lengths.values())) > 1 or 0 in lengths.values():
        raise BadFile(f"{file}: its tensors have {lengths} rows; each holds the same number of samples, at least one.")
    return tensors


def _passages(file: Path, directory: Path, model: nn.Module, length: int) -> Batch:
    tokenizer = load_tokenizer(directory)
    config: Any = model.config
    limit = getattr(config, "max_position_embeddings", None) or length
    length = min(length, limit)
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise BadFile(f"{file} is not UTF-8 text; give text or a .safetensors file of model inputs.") from error
    except OSError as error:
        raise BadFile(f"the calibration file {file} cannot be read: {error}.") from error
    tokens = tokenizer(text, add_special_tokens=False, return_tensors="pt", verbose=False)["input_ids"][0]
    if len(tokens) < length:
        raise BadFile(f"{file} holds {len(tokens)} tokens, a passage is {length}; give more text or --length.")
    passages = tokens[: len(tokens) // length * length].view(-1, length)
    if getattr(config, "is_encoder_decoder", False):
        return {"input_ids": passages, "decoder_input_ids": passages}
    return {"input_ids": passages}
