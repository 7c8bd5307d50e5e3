"""Write a model directory: whole or not at all, with the rights that the model's own files have."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from torch import nn

from vnm_compile.cli.directory import NOT_COPIED, WEIGHT_FILES
from vnm_compile.errors import BadFile, VNMError

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
    if target.exists() and not target.is_dir():
        raise BadFile(f"{out} is a file; give a directory.")
    try:
        occupied = target.is_dir() and any(target.iterdir())
    except OSError as error:
        raise BadFile(f"{out} cannot be read: {error}.") from error
    if occupied and not force:
        raise BadFile(f"{out} is not empty; choose another directory, or replace the model in it with --force.")
    above = next(folder for folder in target.parents if folder.exists())
    if not above.is_dir():
        raise BadFile(f"{out}: {above} is a file; give a directory below a directory.")
    if not os.access(above, os.W_OK | os.X_OK):
        raise BadFile(f"{out} cannot be written: {above} is not writable.")


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
    target = out.resolve()
    try:
        with _parents(target.parent), tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{out.name}-") as written:
            new = Path(written) / "model"
            _fill(new, model, source, reports)
            _swap(new, target, Path(written) / "replaced")
    except VNMError:
        raise
    except Exception as error:  # a full disk: safetensors has an exception of its own for it
        raise BadFile(f"the model cannot be written to {out}: {error}. Nothing was left there.") from error


def _fill(new: Path, model: nn.Module, source: Path, reports: Mapping[str, Any]) -> None:
    ignored = shutil.ignore_patterns(*WEIGHT_FILES, *_REWRITTEN, *NOT_COPIED)
    shutil.copytree(source, new, ignore=ignored)  # links lead no further than the directory: it was checked
    new.chmod(new.stat().st_mode & 0o777 | 0o700)
    copied = {path for path in new.rglob("*") if path.is_file()}
    for path in new.rglob("*"):
        # Packages install read-only files and folders, which nobody could replace.
        path.chmod(path.stat().st_mode & 0o777 | (0o700 if path.is_dir() else _PRIVATE))
    model.save_pretrained(new)  # type: ignore[operator]
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
        if path.is_file() and (path.name == "config.json" or _is_weight(path.name)):
            rights &= path.stat().st_mode
    return rights | _PRIVATE


def _swap(new: Path, out: Path, replaced: Path) -> None:
    """Put `new` in the place of `out`, and into it what of `out` is kept."""
    if not out.exists():
        new.rename(out)
        return
    out.rename(replaced)
    try:
        _keep(replaced, new)
        new.rename(out)
    except BaseException:
        replaced.rename(out)
        raise


def _keep(old: Path, new: Path) -> None:
    """Copy what only the old directory has, weights excepted."""
    for path in sorted(old.iterdir()):
        to, folder = new / path.name, path.is_dir() and not path.is_symlink()
        if _is_weight(path.name):
            continue
        if folder and to.is_dir():
            _keep(path, to)
        elif folder:
            shutil.copytree(path, to, symlinks=True)
        elif not to.exists():
            shutil.copy2(path, to, follow_symlinks=False)


def _is_weight(name: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in WEIGHT_FILES)


@contextmanager
def _parents(folder: Path) -> Iterator[None]:
    """Make a folder and those above it; on an error those that were made go again."""
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        for each in missing:
            try:
                each.rmdir()
            except OSError:
                break
        raise
