"""One self-contained HTML page of what a model gains: its layers, its kernels, where they stand against the machine."""

from vnm_compile.report.page import Page

__all__ = ["Page"]
