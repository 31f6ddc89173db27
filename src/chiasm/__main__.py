"""``python -m chiasm``."""

from chiasm.cli import main

if __name__ == "__main__":
    main()
