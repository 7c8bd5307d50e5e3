"""What Inductor's caches have to know of us: our sources and options, as a part of their keys."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path
from typing import Any

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.runtime.cache_dir_utils import cache_dir as inductor_cache_dir


@functools.cache
def source_hash(folder: str = "") -> str:
    """Hash of every source and template file in a folder of the package: what a cached kernel depends on."""
    package = Path(__file__).resolve().parents[2]
    digest = hashlib.sha256()
    for path in sorted(p for p in (package / folder).rglob("*") if p.suffix in {".py", ".jinja", ".h"}):
        digest.update(str(path.relative_to(package)).encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


class CacheKey(CustomGraphPass):
    """A pass that changes nothing; its uuid puts our sources and options into Inductor's cache keys.

    Lowerings and templates are not part of those keys: without this a new version of the package would be answered
    with kernels of the old one. The user's own pass is run and hashed as it would be without us.
    """

    def __init__(self, options: str, users: Any = None) -> None:
        self.options = options
        self.users = list(users) if isinstance(users, list | tuple) else [users] if users else []

    def __call__(self, graph: torch.fx.Graph) -> None:
        """Run the user's passes."""
        for each in self.users:
            each(graph)

    def uuid(self) -> Any:
        """The package's sources, the options, and the uuids of the user's passes (None where one has none)."""
        theirs = [each.uuid() if isinstance(each, CustomGraphPass) else None for each in self.users]
        return None if None in theirs else ("vnm", source_hash(), self.options, *theirs)


def cache_dir() -> Path:
    """Where Inductor keeps its caches; ours lie beside them."""
    return Path(inductor_cache_dir())
