"""Choosing V and M: the patterns that are fast enough, and of these the one that costs least."""

from vnm_compile.selection.select import CANDIDATES, select_spec
from vnm_compile.selection.table import Candidate, Selection
from vnm_compile.selection.trial import Trial

__all__ = ["CANDIDATES", "Candidate", "Selection", "Trial", "select_spec"]
