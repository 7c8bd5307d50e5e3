"""Write a model directory: whole or not at all, with the rights that the model's own files have."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from vnm_compile.checkpoint.directory import WEIGHT_FILES, check_writable, is_weight, new_directory
from vnm_compile.checkpoint.save import SHARD_BYTES, write_pretrained
from vnm_compile.cli.directory import NOT_COPIED
from vnm_compile.errors import BadFile

_REWRITTEN = ("config.json", "generation_config.json")
_PRIVATE = 0o600


def check_output(out: Path, source: Path, force: bool) -> None:
    """Refuse to write to `out` where that would lose something, or cannot be done.

    Raises:
        VNMError: it is the source itself, inside of it or around it; a file; not empty (without `force`); or its
            directory cannot be written to.
    """
    target, model = out.resolve(), source.resolve()
    if target == model:
        raise BadFile(f"{out} is the model itself; write to another directory.")
    if target.is_relative_to(model):
        raise BadFile(f"{out} lies in the model's directory {source}; write to another directory.")
    if model.is_relative_to(target) and model.exists():
        raise BadFile(f"{out} holds the model's directory {source}; write to another directory.")
    check_writable(out, force, "replace the model in it with --force")


def write_model(model: nn.Module, source: Path, out: Path, reports: Mapping[str, Any]) -> None:
    """Write the model to `out`, with copies of everything in `source` but its weights, and JSON files.

    All is written to a directory beside `out` first, which then takes its place: an interrupted or failed run leaves
    what was there. Files of an earlier model in `out` that are not part of this one's are kept, weights excepted.
    Copies keep the rights of what they are copies of; what is new gets those of the model's weights.

    Args:
        reports: by file name, what to store as JSON.

    Raises:
        VNMError: it cannot be written.
    """
    with new_directory(out) as new:
        _fill(new, model, source, reports)


def _fill(new: Path, model: nn.Module, source: Path, reports: Mapping[str, Any]) -> None:
    ignored = shutil.ignore_patterns(*WEIGHT_FILES, *_REWRITTEN, *NOT_COPIED)
    shutil.copytree(source, new, ignore=ignored)  # links lead no further than the directory: it was checked
    new.chmod(new.stat().st_mode & 0o777 | 0o700)
    copied = {path for path in new.rglob("*") if path.is_file()}
    for path in new.rglob("*"):
        # Packages install read-only files and folders, which nobody could replace.
        path.chmod(path.stat().st_mode & 0o777 | (0o700 if path.is_dir() else _PRIVATE))
    write_pretrained(model, new, SHARD_BYTES)
    for name, content in reports.items():
        (new / name).unlink(missing_ok=True)
        (new / name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    rights = _rights(source)
    for path in new.rglob("*"):
        if path.is_file() and (path not in copied or path.name in reports):
            path.chmod(rights)


def _rights(source: Path) -> int:
    """What all of the model's weight files and its config allow; none is executable."""
    rights = 0o666
    for path in source.iterdir():
        if path.is_file() and (path.name == "config.json" or is_weight(path.name)):
            rights &= path.stat().st_mode
    return rights | _PRIVATE
