"""Choosing V and M: the patterns that are fast enough, and of these the one that costs least."""

from vnm_compile.selection.select import CANDIDATES, select_spec
from vnm_compile.selection.table import Candidate, Selection

__all__ = ["CANDIDATES", "Candidate", "Selection", "select_spec"]
