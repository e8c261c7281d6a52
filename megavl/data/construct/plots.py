"""Plot to code: a diagram of a notebook and the code that drew it (DeepSeek-VL, section 2.1).

The paper collates "every diagram with its preceding code segments" and keeps pairs of "a single image" and at least
five lines of code. Here the code of a diagram is that of its own cell and of the code cells before it, back to the last
cell that drew something: no code is in two pairs. Cells are set apart by a blank line. Lines that are blank, comments
or IPython commands (`%`, `!`, `?`) do not count towards the five.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megavl.data.construct.sample import Dropped, Sample
from megavl.data.decode import decode
from megavl.data.document import Image
from megavl.data.errors import DataError
from megavl.data.readers import notebook
from megavl.data.readers.reader import ReadOptions

_NO_CODE = ("#", "%", "!", "?")


@dataclass(frozen=True)
class Plots:
    """Pairs of the notebooks' diagrams and code."""

    min_lines: int = 5
    suffixes: tuple[str, ...] = notebook.SUFFIXES

    def samples(self, paths: Sequence[str]) -> Iterator[Sample | Dropped]:
        for path in paths:
            try:
                book = notebook.load(path, ReadOptions())
            except DataError as error:
                yield Dropped(path, "no readable notebook", str(error))
                continue
            if book.language not in ("python", "ipython"):
                yield Dropped(path, "not in Python", book.language)
            else:
                yield from self._pairs(path, book.cells)

    def _pairs(self, path: str, cells: Sequence[notebook.Cell]) -> Iterator[Sample | Dropped]:
        code: list[str] = []
        for cell in cells:
            if cell.kind != "code":
                continue
            if source := cell.source.strip("\n"):
                code.append(source)
            if images := [output for output in cell.outputs if isinstance(output, Image)]:
                yield self._pair(f"{path}:{cell.number}", images, "\n\n".join(code))
                code = []

    def _pair(self, where: str, images: list[Image], code: str) -> Sample | Dropped:
        if len(images) > 1:
            return Dropped(where, "more than one image", str(len(images)))
        lines = sum(bool(line.strip()) and not line.lstrip().startswith(_NO_CODE) for line in code.splitlines())
        if lines < self.min_lines:
            return Dropped(where, f"fewer than {self.min_lines} lines of code", str(lines))
        (image,) = images
        try:
            decode(image.data)
        except DataError as error:
            return Dropped(where, "image does not decode", str(error))
        suffix = ".png" if image.data.startswith(b"\x89PNG") else ".jpg"
        return Sample(where, image.data, suffix, code)
