"""A directory is written whole or not at all: beside its place first, which it then takes."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path

from vnm_compile.errors import BadFile, VNMError

WEIGHT_FILES = (
    "*.safetensors",
    "*.safetensors.index.json",
    "pytorch_model*",
    "tf_model*",
    "flax_model*",
    "*.gguf",
    "*.onnx",
)
"""Files of weights, as transformers and others name them."""


def is_weight(name: str) -> bool:
    """Whether a file of this name holds weights, or lists files that do."""
    return any(fnmatchcase(name, pattern) for pattern in WEIGHT_FILES)


def check_writable(out: Path, overwrite: bool, way_out: str) -> None:
    """Refuse a directory that cannot be written to, or that holds something.

    Raises:
        VNMError: it is a file; not empty (without `overwrite`; the message ends with `way_out`); or its directory
            cannot be written to.
    """
    target = out.resolve()
    if target.exists() and not target.is_dir():
        raise BadFile(f"{out} is a file; give a directory.")
    try:
        occupied = target.is_dir() and any(target.iterdir())
    except OSError as error:
        raise BadFile(f"{out} cannot be read: {error}.") from error
    if occupied and not overwrite:
        raise BadFile(f"{out} is not empty; choose another directory, or {way_out}.")
    above = next(folder for folder in target.parents if folder.exists())
    if not above.is_dir():
        raise BadFile(f"{out}: {above} is a file; give a directory below a directory.")
    if not os.access(above, os.W_OK | os.X_OK):
        raise BadFile(f"{out} cannot be written: {above} is not writable.")


@contextmanager
def new_directory(out: Path) -> Iterator[Path]:
    """Hand out a path to make a directory at; it takes the place of `out` when all of it is there.

    An interrupted or failed run leaves what was there. Files in `out` that the new directory does not have are kept,
    weights excepted.

    Raises:
        VNMError: it cannot be written.
    """
    target = out.resolve()
    try:
        with _parents(target.parent), tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{out.name}-") as written:
            new = Path(written) / "model"
            yield new
            _swap(new, target, Path(written) / "replaced")
    except VNMError:
        raise
    except Exception as error:  # a full disk: safetensors has an exception of its own for it
        raise BadFile(f"the model cannot be written to {out}: {error}. Nothing was left there.") from error


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
        if is_weight(path.name):
            continue
        if folder and to.is_dir():
            _keep(path, to)
        elif folder:
            shutil.copytree(path, to, symlinks=True)
        elif not to.exists():
            shutil.copy2(path, to, follow_symlinks=False)


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
