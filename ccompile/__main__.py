"""python -m ccompile."""

from ccompile.cli import main

main()
