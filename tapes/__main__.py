"""``python -m tapes`` is ``tapes``."""

from tapes.cli import main

main()
