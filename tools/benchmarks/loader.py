"""Loader: images/s of the training loader against decoding and resizing alone, in as many processes."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from benchmarks.commands import preprocess
from benchmarks.documents import write_corpus, write_sentencepiece
from benchmarks.images import CAPTION
from benchmarks.measure import Row, Setting, interleave, race_s, table
from benchmarks.pictures import write_captions, write_pictures

from megavl.config.presets import PRESETS
from megavl.config.run import DataConfig, SourceConfig, TextRatioConfig, TrainConfig
from megavl.config.tiles import Grid
from megavl.data.assemble import ImageShare
from megavl.data.decode import decode
from megavl.data.image import empty_pixels
from megavl.data.image import preprocess as write_pixels
from megavl.data.loader import Loader
from megavl.data.sampler import Sampler
from megavl.data.worker import preload_workers

SEQ_LEN, BATCH = 4096, 4
MODELS = ("vl_1b", "vl_7b")


def run(setting: Setting) -> Iterator[str]:
    """The section in Markdown."""
    preload_workers()
    directory = setting.directory
    pictures = write_pictures(directory / "pictures", setting.images)
    captions = write_captions(directory / "captions.jsonl", pictures, CAPTION)
    tokenizer = write_sentencepiece(write_corpus(directory / "learned.jsonl", 1e6), directory / "tokenizer.model")
    preprocess(captions, directory / "images", tokenizer, setting.workers)
    rows = [_row(name, pictures, tokenizer, setting) for name in MODELS]
    lines = [
        "### Training loader",
        "",
        f"{setting.images:,} JPEG files, {setting.workers} worker processes, packs of {SEQ_LEN} tokens, best of "
        f"{setting.repetitions}. Once the worker processes run.",
        "",
        *table(rows, "images/s", lambda timing: f"{timing.rate:.1f}"),
    ]
    yield "\n".join(lines)


def _row(name: str, pictures: list[Path], tokenizer: Path, setting: Setting) -> Row:
    workers = setting.workers
    prefix = setting.directory / "images"
    shares = [(name, pictures[number::workers]) for number in range(workers)]
    works = {
        f"{name}, decoding": (len(pictures), lambda: race_s(pixels_loop, shares)),
        f"{name}, loader": (len(pictures), lambda: _loader_s(name, prefix, tokenizer, len(pictures), workers)),
    }
    decoding, loader = interleave(setting.repetitions, works).values()
    return Row(f"{name}: the loader", loader, "decoding and resizing alone", decoding, "0.95")


def pixels_loop(name: str, pictures: list[Path]) -> Callable[[], None]:
    """A process's share of the images, from the bytes of their files to the pixels of a batch."""
    torch.set_num_threads(1)  # as in the loader's worker processes
    model = PRESETS[name]
    files = [path.read_bytes() for path in pictures]
    pixels = empty_pixels(model, 1)
    overview = Grid(0, 0)

    def work() -> None:
        for data in files:
            write_pixels(decode(data), model, overview, range(1), pixels)

    return work


def _loader_s(name: str, prefix: Path, tokenizer: Path, images: int, workers: int) -> float:
    """Seconds for so many images, after the first steps, which wait for the worker processes to start."""
    data = DataConfig(
        tokenizer=str(tokenizer),
        multimodal=(SourceConfig(prefix=str(prefix)),),
        text_ratio=TextRatioConfig(final=0.0),
        seq_len=SEQ_LEN,
        workers=workers,
    )
    sampler = Sampler(data, PRESETS[name], TrainConfig(steps=100_000, global_batch=BATCH))
    loader = Loader(sampler, dp_rank=0, dp_size=1, images=ImageShare(), first_step=0)
    steps = iter(loader)
    for _ in range(data.prefetch + 1):
        next(steps)
    started, seen = time.perf_counter(), 0
    while seen < images:
        seen += next(steps).images
    elapsed_s = time.perf_counter() - started
    loader.close()
    return elapsed_s * images / seen
