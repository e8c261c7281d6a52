"""Ledger: what a run reads of each source, in documents, tokens and epochs."""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Entry:
    """What is read of one source.

    kind:      "text" or "multimodal"
    share:     of the tokens of its kind
    documents: read, each counted where it begins
    tokens:    read, image tokens included
    epochs:    documents read over the documents of the dataset; how often one is repeated
    """

    kind: str
    source: str
    share: float
    documents: int
    tokens: int
    epochs: float


@dataclass(frozen=True)
class Ledger:
    """What is read in some steps.

    filled: kind -> tokens over the positions of its packs, for the kinds that have steps
    """

    steps: int
    text_steps: int
    filled: dict[str, float]
    entries: tuple[Entry, ...]

    @property
    def headline(self) -> str:
        """Steps of each kind, and how full their packs are."""
        text_share = f" ({self.text_steps / self.steps:.2%} text)" if self.steps else ""
        filled = " and ".join(f"{share:.2%} ({kind})" for kind, share in self.filled.items())
        return (
            f"{self.text_steps:,} text and {self.steps - self.text_steps:,} multimodal steps{text_share}"
            + f", packs filled to {filled}" * bool(filled)
        )

    def __str__(self) -> str:
        rows = [("source", "kind", "share", "documents", "tokens", "epochs")]
        rows += [
            (
                entry.source,
                entry.kind,
                f"{entry.share:.2%}",
                f"{entry.documents:,}",
                f"{entry.tokens:,}",
                f"{entry.epochs:.2f}",
            )
            for entry in self.entries
        ]
        return "\n".join((self.headline, *_lines(rows)))


def _lines(rows: list[tuple[str, ...]]) -> Iterable[str]:
    """The first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *rest in rows:
        cells = [cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)]
        yield "  ".join((first.ljust(widths[0]), *cells))
