"""Make the quickstart's corpus from what every Python installation has: no downloads.

    python tools/make_corpus.py --output data/quickstart

writes, in the record format of tools/preprocess_data.py,

    text.jsonl, heldout_text.jsonl              the documentation of the standard library
    multimodal.jsonl, heldout_multimodal.jsonl  pages of it with their transcripts, charts with their table or code
    images/*.png                                what the multimodal documents show

and with --family vl2

    grounding.jsonl, heldout_grounding.jsonl    where coloured shapes are in drawn scenes, in the paper's three forms

The held-out documents come from chapters and modules of which nothing is in the other files. The same seed and the same
Python give the same corpus.
"""

import argparse
import json
import os
import random
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from corpus.chart import chartable, draw_bars, measure, plot_code, run_plot
from corpus.library import Block, Source, markdown, module_files, module_source, topic_sources
from corpus.page import draw_page, passages
from corpus.scene import record
from PIL import Image
from rich.progress import track

# A page and its transcript take about 64 + 70 positions of the quickstart's model: several documents share a pack.
PASSAGE_CHARACTERS = 150
PAIR_PASSAGE_CHARACTERS = 110
# A step sees a few packs only: of short documents it sees many, and its loss says something of all of them.
SECTION_CHARACTERS = 800
# One source in this many is held out.
HELDOUT_SHARE = 10

Document = list[str | Image.Image]


@dataclass(frozen=True)
class Size:
    """How many multimodal documents of each kind, and how many drawn scenes."""

    pages: int
    page_pairs: int
    code_charts: int
    table_charts: int
    chart_pairs: int
    scenes: int

    @property
    def documents(self) -> int:
        return self.pages + self.page_pairs + self.code_charts + self.table_charts + self.chart_pairs

    def part(self, share: int) -> "Size":
        """One in `share` of each kind, at least two."""
        return Size(*(max(2, count // share) for count in vars(self).values()))


SIZES = {
    "small": Size(pages=1100, page_pairs=150, code_charts=140, table_charts=110, chart_pairs=25, scenes=1600),
    "tiny": Size(pages=20, page_pairs=4, code_charts=4, table_charts=4, chart_pairs=2, scenes=40),
}


def _page(source: Source, passage: tuple[Block, ...], rng: random.Random) -> Document | None:
    """One page of a source and its transcript; half of the pages carry the source's name as a running head."""
    if passage[0].kind != "heading" and len(source.name) <= 20 and rng.random() < 0.5:
        passage = (Block("heading", source.name), *passage)
    image = draw_page(passage, rng)
    return [image, markdown(passage)] if image else None


def page_documents(sources: list[Source], count: int, rng: random.Random) -> Iterator[Document]:
    """Document OCR pairs: a page, its transcript."""
    candidates = [(s, passage) for s in sources for passage in passages(s.blocks, PASSAGE_CHARACTERS)]
    rng.shuffle(candidates)
    pages = filter(None, (_page(source, passage, rng) for source, passage in candidates))
    yield from (page for page, _ in zip(pages, range(count), strict=False))


def page_pair_documents(sources: list[Source], count: int, rng: random.Random) -> Iterator[Document]:
    """Interleaved documents: words, a page, its transcript, the next page, its transcript."""
    candidates = [(s, pair) for s in sources for pair in pairwise(passages(s.blocks, PAIR_PASSAGE_CHARACTERS))]
    rng.shuffle(candidates)
    for source, pair in candidates:
        if count == 0:
            return
        pages = [_page(source, passage, rng) for passage in pair]
        if all(pages):
            count -= 1
            yield [f"Two pages from the documentation of {source.name}.\n\n", *pages[0], *pages[1]]


def chart_documents(sources: list[Source], size: Size, rng: random.Random) -> Iterator[Document]:
    """A chart and the code that drew it; a chart and its table; two charts with theirs in one document."""
    modules = chartable(sources)
    for _ in range(size.code_charts):
        code = plot_code(measure(modules, rng), rng)
        yield [run_plot(code), code]

    def table_chart() -> Document:
        measurement = measure(modules, rng)
        return [draw_bars(measurement, rng), measurement.table()]

    for _ in range(size.table_charts):
        yield table_chart()
    for _ in range(size.chart_pairs):
        yield ["Modules of the standard library, measured twice.\n\n", *table_chart(), *table_chart()]


def multimodal_documents(sources: list[Source], size: Size, rng: random.Random) -> Iterator[Document]:
    yield from page_documents(sources, size.pages, rng)
    yield from page_pair_documents(sources, size.page_pairs, rng)
    yield from chart_documents(sources, size, rng)


def write_lines(path: Path, records: list[dict]) -> None:
    """Write a jsonl file that is whole as soon as it has its name."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    os.replace(partial, path)


def sections(source: Source) -> Iterator[str]:
    """The text of a source, cut between its blocks into documents of about `SECTION_CHARACTERS`."""
    section: list[Block] = []
    for block in source.blocks:
        section.append(block)
        if sum(len(b.text) for b in section) >= SECTION_CHARACTERS:
            yield markdown(tuple(section))
            section = []
    if section:
        yield markdown(tuple(section))


def write_text(path: Path, sources: list[Source], rng: random.Random) -> None:
    records = [
        {"id": f"{source.name}/{number}", "text": text}
        for source in sources
        for number, text in enumerate(sections(source))
    ]
    rng.shuffle(records)
    write_lines(path, records)
    print(f"  {path}: {len(records)} documents, {sum(len(r['text']) for r in records) / 1e6:.2f} M characters")


def write_multimodal(path: Path, sources: list[Source], size: Size, rng: random.Random) -> None:
    """Images first, then the file that names them."""
    records, images = [], 0
    documents = multimodal_documents(sources, size, rng)
    if sys.stdout.isatty():
        documents = track(documents, f"  {path.stem}", total=size.documents, transient=True)
    for number, document in enumerate(documents):
        segments = []
        for segment in document:
            if isinstance(segment, Image.Image):
                name = f"images/{path.stem}_{images:05d}.png"
                segment.save(path.parent / name, compress_level=1)
                images += 1
                segments.append({"image": name})
            else:
                segments.append({"text": segment})
        records.append({"id": f"{path.stem}/{number}", "segments": segments})
    rng.shuffle(records)
    write_lines(path, records)
    print(f"  {path}: {len(records)} documents, {images} images")


def write_grounding(path: Path, scenes: int, rng: random.Random) -> None:
    """As `write_multimodal`."""
    records, images = [], 0
    for number in range(scenes):
        pictures, rest = record(rng)
        names = [f"images/{path.stem}_{images + index:05d}.png" for index in range(len(pictures))]
        for name, picture in zip(names, pictures, strict=True):
            picture.save(path.parent / name, compress_level=1)
        images += len(pictures)
        records.append({"id": f"{path.stem}/{number}", "images": names, **rest})
    write_lines(path, records)
    print(f"  {path}: {len(records)} documents, {images} images")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="directory; an earlier corpus in it is replaced")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", choices=SIZES, default="small", help="tiny is for tests")
    parser.add_argument("--family", choices=("vl", "vl2"), default="vl", help="for whose models; default vl")
    arguments = parser.parse_args()

    start = time.perf_counter()
    output, size, rng = arguments.output, SIZES[arguments.size], random.Random(arguments.seed)
    for old in output.glob("*.jsonl"):
        old.unlink()
    shutil.rmtree(output / "images", ignore_errors=True)
    (output / "images").mkdir(parents=True)

    sources = topic_sources() + [module_source(name, path) for name, path in module_files()]
    sources = [source for source in sources if any(block.kind == "paragraph" for block in source.blocks)]
    rng.shuffle(sources)
    heldout, train = sources[::HELDOUT_SHARE], [s for i, s in enumerate(sources) if i % HELDOUT_SHARE]
    write_text(output / "text.jsonl", train, rng)
    write_text(output / "heldout_text.jsonl", heldout, rng)
    write_multimodal(output / "multimodal.jsonl", train, size, rng)
    write_multimodal(output / "heldout_multimodal.jsonl", heldout, size.part(20), rng)
    if arguments.family == "vl2":
        write_grounding(output / "grounding.jsonl", size.scenes, rng)
        write_grounding(output / "heldout_grounding.jsonl", size.part(20).scenes, rng)
    print(f"  {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
