"""Names that come from outside (of layers, kernels) as names of files: no name is ever a path."""

from __future__ import annotations

import hashlib
import re

_SAFE = re.compile(r"[a-z0-9_][a-z0-9_.\-]*")
_RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?")  # devices on Windows, whatever their suffix
_LONGEST = 100


def file_name(name: str, suffix: str = "") -> str:
    """Return a name for the file (or folder) of something called `name`, the same every time, another for every name.

    A name of small letters, digits, `_`, `-` and inner dots stays as it is. Any other (slashes, `..`, control
    characters, capitals, which some file systems do not tell from small letters, very long names) is cut down to its
    harmless characters and told apart by a hash of the whole: `layer.~2f8a...`.

    >>> file_name("net.0", ".safetensors")
    'net.0.safetensors'
    """
    if len(name) <= _LONGEST and _SAFE.fullmatch(name) and not name.endswith(".") and not _RESERVED.fullmatch(name):
        return name + suffix
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:32]
    readable = re.sub(r"[^A-Za-z0-9_.\-]+", "-", name[:_LONGEST], flags=re.ASCII).lstrip(".-")[:48]
    # No name that stays as it is has a "~", so the two kinds never meet.
    return f"{readable}~{digest}{suffix}"
