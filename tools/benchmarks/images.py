"""Images: packing image files into a dataset against copying them."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.commands import preprocess
from benchmarks.documents import write_corpus, write_sentencepiece
from benchmarks.measure import Row, Setting, interleave, race_s, table, wall_s
from benchmarks.pictures import write_captions, write_pictures

from megavl.data.decode import decode
from megavl.data.encoded import EncodedDocument, EncodedImage
from megavl.data.tokenizer import load_tokenizer
from megavl.data.writer import StoreWriter

CAPTION = "Smooth shapes of many colours under a little noise, as a camera sees them in the evening."


def run(setting: Setting) -> Iterator[str]:
    """The section in Markdown."""
    directory, workers = setting.directory, setting.workers
    pictures = write_pictures(directory / "pictures", setting.images)
    captions = write_captions(directory / "captions.jsonl", pictures, CAPTION)
    one = write_captions(directory / "one.jsonl", pictures[:1], CAPTION)
    tokenizer = write_sentencepiece(write_corpus(directory / "learned.jsonl", 1e6), directory / "tokenizer.model")
    size_bytes = sum(path.stat().st_size for path in pictures)
    shares = [(pictures[number::workers],) for number in range(workers)]

    def packing_s(captions: Path) -> float:
        part = str(captions.stat().st_size // (4 * workers) + 1)
        return wall_s(lambda: preprocess(captions, directory / "images", tokenizer, workers, "--part-bytes", part))

    works = {
        "copying": (size_bytes, lambda: wall_s(lambda: _copy(pictures, directory / "copy"))),
        "writing": (size_bytes, lambda: wall_s(lambda: _write(pictures, directory / "written", tokenizer))),
        "decoding": (size_bytes, lambda: race_s(decode_loop, shares)),
        "start": (0, lambda: packing_s(one)),
        "packing": (size_bytes, lambda: packing_s(captions)),
    }
    timings = interleave(setting.repetitions, works)
    packing = timings["packing"].after(timings["start"])
    rows = [
        Row("preprocess_data", packing, "copying the files", timings["copying"]),
        Row("preprocess_data", packing, f"decoding them in {workers} processes", timings["decoding"]),
        Row("its writer alone, in one process", timings["writing"], "copying the files", timings["copying"]),
    ]
    lines = [
        "### Packing images",
        "",
        f"{len(pictures):,} JPEG files of {size_bytes / len(pictures) / 1e3:.0f} kB, {workers} processes, best of "
        f"{setting.repetitions}. Without the start of the command, which takes {min(timings['start'].seconds):.1f} s. "
        "preprocess_data decodes every image once as a check.",
        "",
        *table(rows, "GB/s", lambda timing: f"{timing.rate / 1e9:.3f}"),
    ]
    yield "\n".join(lines)


def decode_loop(pictures: list[Path]) -> Callable[[], None]:
    """A process's share of the images, decoded."""

    def work() -> None:
        for path in pictures:
            decode(path.read_bytes())

    return work


def _copy(pictures: list[Path], directory: Path) -> None:
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    for path in pictures:
        shutil.copyfile(path, directory / path.name)


def _write(pictures: list[Path], prefix: Path, tokenizer: Path) -> None:
    with StoreWriter(str(prefix), load_tokenizer(str(tokenizer)), overwrite=True) as writer:
        for path in pictures:
            writer.add(EncodedDocument(path.name, "pictures", (EncodedImage(path.read_bytes(), 1, 1),)))
