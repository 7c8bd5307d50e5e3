"""Load and faults: many threads, many processes, broken caches. `python -m tests.load` prints the figures."""
