"""What a check found: how many things are wrong, and the first of them in words."""

from dataclasses import dataclass, field
from operator import itemgetter

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


class InOrder:
    """What the parts of a check found, each with its number, whatever the order in which they end."""

    def __init__(self) -> None:
        self._count = 0
        self._messages: list[tuple[int, str]] = []

    def add(self, number: int, found: Found) -> None:
        """What one more part found. The first messages are kept, by the numbers of their parts."""
        self._count += found.count
        self._messages += [(number, message) for message in found.messages]
        self._messages.sort(key=itemgetter(0))
        del self._messages[LIMIT:]

    def together(self) -> Found:
        """As one part would have found it."""
        return Found(self._count, [message for _, message in self._messages])
