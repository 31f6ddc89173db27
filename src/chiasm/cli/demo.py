"""``chiasm demo``."""


def demo() -> None:
    """Draw a picture, ask about it, and show who answered what."""
