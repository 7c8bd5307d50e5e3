"""Model directories as transformers writes them: load one, and write one beside what else it holds."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from vnm_compile.errors import VNMError

_WEIGHT_FILES = (
    "*.safetensors",
    "*.safetensors.index.json",
    "pytorch_model*",
    "tf_model*",
    "flax_model*",
    "*.gguf",
    "*.onnx",
)
_REWRITTEN = ("config.json", "generation_config.json")
_NOT_COPIED = ("onnx", "openvino", ".git")  # folders that hold the dense weights once more


def load_model(directory: Path) -> nn.Module:
    """Load the model that `config.json` names, in the dtype it is stored in and in eval mode.

    Raises:
        VNMError: there is no such directory or config, or transformers has no class of that name.
    """
    import transformers

    transformers.utils.logging.disable_progress_bar()  # a bar of its own for every file is no news to the user
    if not (directory / "config.json").is_file():
        raise VNMError(f"{directory} holds no config.json; give the directory of a Hugging Face model.")
    config = json.loads((directory / "config.json").read_text())
    if config.get("auto_map"):
        raise VNMError(f"{directory}: the model brings code of its own, which is not run; prune it with vnm.sparsify.")
    architectures = config.get("architectures") or ["AutoModel"]
    kind = getattr(transformers, architectures[0], None)
    if kind is None:
        version = transformers.__version__
        raise VNMError(f"{directory}: transformers {version} has no class {architectures[0]}; update transformers.")
    try:
        model: nn.Module = kind.from_pretrained(directory, dtype="auto", local_files_only=True)
    except OSError as error:
        raise VNMError(f"{directory}: its weights cannot be loaded: {error}") from error
    return model.eval()


def load_tokenizer(directory: Path) -> Any:
    """Load the tokenizer of a model directory.

    Raises:
        VNMError: it has none.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise VNMError(
            f"{directory} holds no tokenizer that can be loaded ({error}), so text cannot be its calibration data; "
            "give a .safetensors file of model inputs."
        ) from error


def check_output(out: Path, source: Path, force: bool) -> None:
    """Refuse to write to `out` where that would lose something.

    Raises:
        VNMError: it is the source itself, a file, or, without `force`, a directory that is not empty.
    """
    if out.resolve() == source.resolve():
        raise VNMError(f"{out} is the model itself; write to another directory.")
    if out.exists() and not out.is_dir():
        raise VNMError(f"{out} is a file; give a directory.")
    if out.is_dir() and any(out.iterdir()) and not force:
        raise VNMError(f"{out} is not empty; choose another directory, or replace the model in it with --force.")


def write_model(model: nn.Module, source: Path, out: Path, reports: Mapping[str, Any]) -> None:
    """Write the model to `out`, with copies of everything in `source` but its weights, and JSON files.

    All is written to a directory beside `out` first, so that an interrupted run leaves no half of a model. Files of
    an earlier model in `out` that are not part of this one's are kept, weights excepted.

    Args:
        reports: by file name, what to store as JSON.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as written:
        new = Path(written) / "model"
        ignored = shutil.ignore_patterns(*_WEIGHT_FILES, *_REWRITTEN, *_NOT_COPIED)
        shutil.copytree(source, new, ignore=ignored)
        model.save_pretrained(new)  # type: ignore[operator]
        for name, content in reports.items():
            (new / name).write_text(json.dumps(content, indent=1) + "\n")
        # Packages install read-only files, and safetensors writes private ones: neither is meant for the output.
        for path in new.rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)
        out.mkdir(exist_ok=True)
        for stale in (path for pattern in _WEIGHT_FILES for path in out.glob(pattern)):
            stale.unlink()
        shutil.copytree(new, out, dirs_exist_ok=True)
