"""What a check found: how many things are wrong, and the first of them in words."""

from dataclasses import dataclass, field

# Messages that are kept of one check; the rest is counted.
LIMIT = 20


@dataclass
class Found:
    """What one check found, or one part of its work."""

    count: int = 0
    messages: list[str] = field(default_factory=list)

    def add(self, message: str) -> None:
        """One more thing is wrong."""
        self.more(1, [message])

    def more(self, count: int, messages: list[str]) -> None:
        """`count` more things are wrong, of which `messages` name some."""
        self.count += count
        self.messages += messages[: LIMIT - len(self.messages)]
