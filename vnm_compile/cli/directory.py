"""Model directories as transformers writes them: looked at first, then loaded. Nothing of them is run or unpickled."""

from __future__ import annotations

import os
import pickle
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vnm_compile.checkpoint.directory import is_weight
from vnm_compile.checkpoint.files import first_line, indexed, read_json
from vnm_compile.errors import BadFile, VNMError
from vnm_compile.names import some_of

if TYPE_CHECKING:
    from vnm_compile.integrations.transformers import VnmConfig

NOT_COPIED = ("onnx", "openvino", ".git")  # folders that hold the dense weights once more


def load_model(directory: Path, compress: VnmConfig | None = None, state: dict[str, Tensor] | None = None) -> nn.Module:
    """Load the model that `config.json` names, in the dtype it is stored in and in eval mode.

    Args:
        directory: of the model. Weights that are compressed there stay so.
        compress: how dense weights are compressed while they are loaded; None leaves them dense.
        state: the weights by name, where they are not read from the directory.

    Raises:
        VNMError: there is no such directory or config, it holds links that lead out of it, transformers has no class
            of that name, or the files do not hold exactly the model's weights.
    """
    check_directory(directory)
    kind = _model_class(directory, read_json(directory / "config.json"))
    for index in sorted(directory.glob("*.index.json")):
        indexed(index)
    options: dict[str, Any] = {} if compress is None else {"quantization_config": compress}
    if state is not None:
        config = _config(directory)
        floats = [tensor.dtype for tensor in state.values() if tensor.is_floating_point()]
        options |= {"config": config, "state_dict": state, "dtype": floats[0] if floats else "auto"}
        if hasattr(kind, "from_config"):  # an Auto class, which reads a directory to choose
            with _loading(directory), torch.device("meta"):
                kind = type(kind.from_config(config))
    with _loading(directory):
        model, info = kind.from_pretrained(
            directory if state is None else None,
            **{"dtype": "auto"} | options,
            local_files_only=True,
            trust_remote_code=False,
            weights_only=True,
            ignore_mismatched_sizes=True,  # so that they are named, below
            output_loading_info=True,
        )
    _check_complete(directory, info)
    loaded: nn.Module = model
    return loaded.eval()


def random_model(path: Path, blocks: int | None) -> nn.Module:
    """A model of random weights, in eval mode.

    Args:
        path: a config.json, or the directory of one; weights beside it are not looked at.
        blocks: how many of its blocks there are to be; None for all.

    Raises:
        VNMError: there is no config, or transformers cannot make a model of it.
    """
    directory = path if path.is_dir() else path.parent
    check_directory(directory)
    described = read_json(path if path.is_file() else path / "config.json")
    kind, config = _model_class(directory, described), _config(path)
    text = config.get_text_config()
    if blocks is not None and not hasattr(text, "num_hidden_layers"):
        raise BadFile(f"{path} does not say by num_hidden_layers how many blocks there are, so --blocks is of no use.")
    if blocks is not None:
        text.num_hidden_layers = min(blocks, text.num_hidden_layers)
        if isinstance(getattr(text, "layer_types", None), list):
            text.layer_types = text.layer_types[:blocks]
    with _loading(directory):
        made: nn.Module = kind.from_config(config) if hasattr(kind, "from_config") else kind(config)
    dtype = getattr(config, "dtype", None)
    return made.to(dtype).eval() if isinstance(dtype, torch.dtype) else made.eval()


def has_weights(directory: Path) -> bool:
    """Whether a directory holds weights that transformers would read."""
    return any(is_weight(path.name) for path in directory.iterdir())


def _config(path: Path) -> Any:
    """A model's config without what it says of how weights are stored."""
    import transformers

    with _loading(path):
        config = transformers.AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    config.__dict__.pop("quantization_config", None)
    return config


@contextmanager
def _loading(directory: Path) -> Iterator[None]:
    """What transformers says while it loads is said by us, as an error; anything may come of a damaged file."""
    import transformers

    import_module("vnm_compile.integrations.transformers")  # compressed models, too
    transformers.utils.logging.disable_progress_bar()  # a bar of its own for every file is no news to the user
    level = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    try:
        yield
    except (MemoryError, VNMError):
        raise
    except pickle.UnpicklingError as error:
        raise BadFile(f"{directory}: its weights hold more than tensors, and are not unpickled.") from error
    except Exception as error:
        raise BadFile(f"{directory}: the model cannot be loaded: {first_line(error)}") from error
    finally:
        transformers.utils.logging.set_verbosity(level)


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
        some_of(str(key[0] if isinstance(key, tuple) else key) for key in info.get(f"{kind}_keys") or ())
        for kind in ("missing", "mismatched", "unexpected")
    )
    if missing:
        raise BadFile(f"{directory}: weights are missing, which would be random: {missing}.")
    if mismatched:
        raise BadFile(f"{directory}: weights have other shapes than config.json says: {mismatched}.")
    if unexpected:
        raise BadFile(f"{directory}: its files hold weights that the model has no place for: {unexpected}.")
    if info.get("error_msgs"):
        raise BadFile(f"{directory}: the model cannot be loaded: {first_line(info['error_msgs'])}")
