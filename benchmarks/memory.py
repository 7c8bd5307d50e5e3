"""How much memory a piece of work takes at most, by what the process owns."""

from __future__ import annotations

import threading
import time
from pathlib import Path


def owned() -> int:
    """Bytes of memory that this process owns."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024


class Peak(threading.Thread):
    """The most memory that is owned while it runs."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most, self.done = 0, threading.Event()

    def run(self) -> None:
        while not self.done.is_set():
            self.most = max(self.most, owned())
            time.sleep(0.0005)
