"""``python -m graincopy``: the same as the console script."""

from graincopy.cli.main import main

main()
