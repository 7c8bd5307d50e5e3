"""Benchmarks, each one command: `python -m benchmarks.cpu`."""
