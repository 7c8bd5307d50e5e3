"""Model directories as transformers writes them: looked at first, then loaded. Nothing of them is run or unpickled."""

from __future__ import annotations

import os
import pickle
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from torch import nn

from vnm_compile.checkpoint.files import first_line, indexed, read_json
from vnm_compile.errors import BadFile

NOT_COPIED = ("onnx", "openvino", ".git")  # folders that hold the dense weights once more
_NAMES_SHOWN = 3


def load_model(directory: Path) -> nn.Module:
    """Load the model that `config.json` names, in the dtype it is stored in and in eval mode.

    Raises:
        VNMError: there is no such directory or config, it holds links that lead out of it, transformers has no class
            of that name, or the files do not hold exactly the model's weights.
    """
    check_directory(directory)
    kind = _model_class(directory, read_json(directory / "config.json"))
    for index in sorted(directory.glob("*.index.json")):
        indexed(index)
    import transformers

    transformers.utils.logging.disable_progress_bar()  # a bar of its own for every file is no news to the user
    level = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()  # what its table of keys says is said by us, as an error
    try:
        model, info = kind.from_pretrained(
            directory,
            dtype="auto",
            local_files_only=True,
            trust_remote_code=False,
            weights_only=True,
            ignore_mismatched_sizes=True,  # so that they are named, below
            output_loading_info=True,
        )
    except MemoryError:
        raise
    except pickle.UnpicklingError as error:
        raise BadFile(f"{directory}: its weights hold more than tensors, and are not unpickled.") from error
    except Exception as error:  # anything may come of a damaged file; the class's name says what did
        raise BadFile(f"{directory}: the model cannot be loaded: {first_line(error)}") from error
    finally:
        transformers.utils.logging.set_verbosity(level)
    _check_complete(directory, info)
    loaded: nn.Module = model
    return loaded.eval()


def load_tokenizer(directory: Path) -> Any:
    """Load the tokenizer of a model directory.

    Raises:
        VNMError: it has none, or one that brings code of its own.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # as with models
        raise BadFile(
            f"{directory} holds no tokenizer that can be loaded ({first_line(error)}), so text cannot be its "
            "calibration data; give a .safetensors file of model inputs."
        ) from error


def check_directory(directory: Path) -> None:
    """Refuse what is no model directory, and what would be read from elsewhere by links in it.

    Raises:
        VNMError: it is missing or a file, holds no config.json, a link out of it, or a file that is none (a pipe).
    """
    if not directory.exists():
        hint = "; models are not downloaded: get it first (hf download), then give its directory"
        raise BadFile(f"{directory} is no directory on this machine{hint}.")
    if not directory.is_dir():
        raise BadFile(f"{directory} is a file; give the directory of a Hugging Face model.")
    if not (directory / "config.json").is_file():
        raise BadFile(f"{directory} holds no config.json; give the directory of a Hugging Face model.")
    if (directory / "adapter_config.json").exists():
        raise BadFile(f"{directory} holds an adapter; merge it into its model first (peft's merge_and_unload).")
    root = _root(directory)
    for path in files_below(directory):
        if path.is_symlink() and not path.resolve().is_relative_to(root):
            raise BadFile(
                f"{path} is a link to {path.resolve()}, out of the model's directory, and is not followed; "
                "put a copy of what it leads to in its place."
            )
        if not path.exists() or not stat.S_ISREG(path.stat().st_mode):
            raise BadFile(f"{path} is no file that can be read (a broken link, a pipe, a device); remove it.")


def files_below(directory: Path) -> Iterator[Path]:
    """Everything in a directory that is no plain folder; folders that are not copied are left out."""
    for folder, folders, files in os.walk(directory):
        folders[:] = sorted(name for name in folders if name not in NOT_COPIED)
        yield from (Path(folder, name) for name in (*folders, *sorted(files)) if Path(folder, name).is_symlink())
        yield from (Path(folder, name) for name in sorted(files) if not Path(folder, name).is_symlink())


def _root(directory: Path) -> Path:
    """What links may lead to: the directory, and of a snapshot in the Hugging Face cache its repository's files."""
    real = directory.resolve()
    in_cache = real.parent.name == "snapshots" and real.parent.parent.name.startswith("models--")
    return real.parent.parent if in_cache else real


def _model_class(directory: Path, config: dict[str, Any]) -> Any:
    import transformers

    if _brings_code(config):
        raise BadFile(f"{directory}: the model brings code of its own, which is not run; prune it with vnm.sparsify.")
    names = config.get("architectures")
    if names is None or names == []:
        return transformers.AutoModel
    name = names[0] if isinstance(names, list) else None
    if not isinstance(name, str):
        raise BadFile(f"{directory}: architectures in config.json is {names!r}; expected a list of names of classes.")
    try:
        kind = getattr(transformers, name, None) if name.isidentifier() else None
    except Exception as error:  # the class needs a package that is not there
        raise BadFile(f"{directory}: {name} cannot be imported: {first_line(error)}") from error
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        version = transformers.__version__
        raise BadFile(f"{directory}: transformers {version} has no class {name} of models; update transformers.")
    return kind


def _brings_code(config: Any) -> bool:
    """Whether a config, or one inside it, names code in the directory."""
    if isinstance(config, dict):
        return bool(config.get("auto_map")) or any(map(_brings_code, config.values()))
    return isinstance(config, list) and any(map(_brings_code, config))


def _check_complete(directory: Path, info: dict[str, Any]) -> None:
    missing, mismatched, unexpected = (
        _shown(info.get(f"{kind}_keys") or ()) for kind in ("missing", "mismatched", "unexpected")
    )
    if missing:
        raise BadFile(f"{directory}: weights are missing, which would be random: {missing}.")
    if mismatched:
        raise BadFile(f"{directory}: weights have other shapes than config.json says: {mismatched}.")
    if unexpected:
        raise BadFile(f"{directory}: its files hold weights that the model has no place for: {unexpected}.")
    if info.get("error_msgs"):
        raise BadFile(f"{directory}: the model cannot be loaded: {first_line(info['error_msgs'])}")


def _shown(keys: Iterable[Any]) -> str:
    names = sorted(str(key[0] if isinstance(key, tuple) else key) for key in keys)
    more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return ", ".join(names[:_NAMES_SHOWN]) + more
