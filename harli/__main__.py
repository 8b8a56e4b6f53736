"""``python -m harli`` is ``harli``."""

from harli.cli import main

main()
