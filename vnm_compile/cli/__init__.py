"""The `vnm-compile` command: Hugging Face model directories in, reports and model directories out."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line; what `vnm-compile` and `python -m vnm_compile.cli` start."""
    try:
        from vnm_compile.cli.app import app
    except ModuleNotFoundError as missing:
        if missing.name not in ("typer", "transformers"):
            raise
        sys.exit(f"the command line needs {missing.name}: pip install 'vnm-compile[cli]'")
    app()
