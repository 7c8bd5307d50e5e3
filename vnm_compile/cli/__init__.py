"""The `vnm-compile` command: Hugging Face model directories in, reports and model directories out."""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Run the command line, offline; what `vnm-compile` and `python -m vnm_compile.cli` start."""
    os.environ["HF_HUB_OFFLINE"] = os.environ["TRANSFORMERS_OFFLINE"] = "1"  # read when transformers is imported
    try:
        from vnm_compile.cli.app import app
    except ModuleNotFoundError as missing:
        if missing.name not in ("typer", "transformers"):
            raise
        sys.exit(f"the command line needs {missing.name}: pip install 'vnm-compile[cli]'")
    app()
