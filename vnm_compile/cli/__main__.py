"""`python -m vnm_compile.cli`: the command line where its script is not on the path."""

from vnm_compile.cli import main

main()
