"""Text for the pretrained MiniLM, of two kinds, each in disjoint parts to train on, to calibrate on and to judge by.

General English: the glosses of WordNet (Debian's package wordnet-base). Documentation: that of Python, and the
docstrings of its library.
"""

from __future__ import annotations

import ast
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import Tensor

WORDNET = Path("/usr/share/wordnet")
HELD_OUT, CALIBRATION = 512, 1024  # glosses
SHORT, LONG = 24, 96  # tokens of a single gloss and of several, at most
TOKENS = 2048  # of a batch


@dataclass(frozen=True)
class Texts:
    """What is trained on (glosses, documentation; the latter may be none), calibrated on and judged by."""

    training: list[str]
    training_docs: list[str]
    calibration: list[dict[str, Tensor]]
    general: list[dict[str, Tensor]]
    docs: list[dict[str, Tensor]]
    tokenizer: Any


def glosses() -> list[str]:
    """The definitions and examples of all of WordNet's meanings, in the order of its files."""
    found = []
    for part in ("noun", "verb", "adj", "adv"):
        path = WORDNET / f"data.{part}"
        if not path.exists():
            raise SystemExit("WordNet is not here: apt install wordnet-base")
        for line in path.read_text(encoding="latin-1").splitlines():
            if not line.startswith("  "):  # the licence
                found.append(line.split(" | ", 1)[1].strip())
    return found


def documentation() -> tuple[list[str], list[str]]:
    """Paragraphs of Python's documentation: 256 to judge by, and the others, with the docstrings of its library."""
    paragraphs = dict.fromkeys(each.strip() for text in topics.values() for each in text.split("\n\n"))
    long = [each for each in paragraphs if len(each) > 150]
    held = long[:: max(1, len(long) // 256)][:256]
    return held, [*(each for each in long if each not in set(held)), *docstrings()]


def docstrings() -> list[str]:
    """Those of Python's library that are a paragraph at least."""
    found = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        if {"site-packages", "test", "tests", "idlelib", "pydoc_data"} & set(path.parts):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        found += [ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, kinds)]
    return [each for each in dict.fromkeys(found) if len(each) > 150]


def texts(tokenizer: Any, with_docs: bool = True) -> Texts:
    """Disjoint parts; the same for every seed, so that runs are judged alike."""
    found = glosses()
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(0)).tolist()
    held, calibration, training = (
        [found[i] for i in part]
        for part in (order[:HELD_OUT], order[HELD_OUT : HELD_OUT + CALIBRATION], order[HELD_OUT + CALIBRATION :])
    )
    docs, training_docs = documentation()
    calibrated = list(batches(tokenizer, calibration, SHORT))
    if with_docs:  # half as many, since they are longer
        order = torch.randperm(len(training_docs), generator=torch.Generator().manual_seed(0)).tolist()
        chosen = [training_docs.pop(i) for i in sorted(order[: CALIBRATION // 4], reverse=True)]
        calibrated = [*calibrated[::2], *batches(tokenizer, chosen, LONG)]
    return Texts(
        training,
        training_docs if with_docs else [],
        calibrated,
        list(batches(tokenizer, held, 64)),
        list(batches(tokenizer, docs, 128)),
        tokenizer,
    )


def batches(
    tokenizer: Any, found: list[str], length: int, size: int = 32, fill: bool = False
) -> Iterator[dict[str, Tensor]]:
    """Texts by size of batch, padded to the longest of each, or to `length`, so that all have one shape."""
    for i in range(0, len(found), size):
        batch = tokenizer(
            found[i : i + size],
            padding="max_length" if fill else True,
            truncation=True,
            max_length=length,
            return_tensors="pt",
        )
        yield {name: batch[name] for name in ("input_ids", "attention_mask")}


def batch_of(data: Texts, step: int, seed: int) -> dict[str, Tensor]:
    """What a step trains on, in one of two shapes: by turns documentation, and glosses, single or several joined."""
    generator = torch.Generator().manual_seed(1_000_003 * seed + step)
    if data.training_docs and step % 2:
        chosen = torch.randint(len(data.training_docs), (TOKENS // LONG,), generator=generator).tolist()
        return next(batches(data.tokenizer, [data.training_docs[i] for i in chosen], LONG, TOKENS // LONG, True))
    turn = step // 2 if data.training_docs else step
    joined, length = (1, SHORT) if turn % 2 else (6, LONG)
    size = TOKENS // length
    chosen = torch.randint(len(data.training), (size, joined), generator=generator).tolist()
    found = [". ".join(data.training[i] for i in each) for each in chosen]
    return next(batches(data.tokenizer, found, length, size, True))
