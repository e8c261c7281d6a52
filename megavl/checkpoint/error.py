"""What is wrong with a checkpoint, and lists that fit into a message."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be written, found, read or used; the message says why and what to do."""


def some(names: list[str]) -> str:
    """The first names of a list, and how many more there are."""
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
