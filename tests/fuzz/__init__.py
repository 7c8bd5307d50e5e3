"""A differential fuzzer: random modules in ordinary torch style, compiled by us and compared with eager in float64.

    python -m tests.fuzz --minutes 10

A case is a program (`program.py`): steps drawn by `steps.py`, settings, and writes to the weights between calls
(`writes.py`). `run.py` compiles it and compares every call, `shrink.py` makes a failing case small, `campaign.py` runs
many in worker processes, `mutants.py` shows that the faults which are known by name would be found again.
"""
