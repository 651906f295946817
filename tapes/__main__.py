"""``python -m tapes`` is ``tapes``."""

from tapes.cli import main

if __name__ == "__main__":
    main()
