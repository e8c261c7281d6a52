"""Packed access: the packs that a step reads against megatron-core's readers on the same files."""

import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

import numpy as np
from benchmarks.commands import preprocess
from benchmarks.documents import write_corpus, write_sentencepiece
from benchmarks.measure import Row, Setting, Timing, interleave, table, wall_s

from megavl.config.presets import PRESETS
from megavl.config.run import DataConfig, SourceConfig, TextRatioConfig, TrainConfig
from megavl.data.loader import Loader
from megavl.data.sampler import Sampler
from megavl.data.store import Store

SEQ_LEN, BATCH = 4096, 8
# Documents read whole, and steps of packs, in one repetition.
DOCUMENTS, STEPS = 20_000, 100


def run(setting: Setting) -> Iterator[str]:
    """The section in Markdown."""
    if find_spec("megatron") is None:
        yield "### Packed access\n\nmegatron-core is not installed: there is nothing to compare with."
        return
    from benchmarks import megatron_core

    directory = setting.directory
    corpus = write_corpus(directory / "text.jsonl", setting.megabytes * 1e6)
    tokenizer = write_sentencepiece(corpus, directory / "tokenizer.model")
    prefix = directory / "packed"
    preprocess(corpus, prefix, tokenizer, setting.workers)
    places = np.random.default_rng(0).integers(0, len(Store(str(prefix))), DOCUMENTS).tolist()
    step = setting.resume_at
    opened = open_sampler(prefix, tokenizer, step)
    near = opened.position(0)
    anew_s = wall_s(lambda: opened.position(step))
    far = opened.position(step)
    cache = directory / "cache"

    def theirs(first: int, packs: int) -> None:
        samples = megatron_core.open_samples(prefix, SEQ_LEN, step * BATCH, cache)
        for number in range(first, first + packs):
            samples[number]

    works = {
        "documents": (DOCUMENTS, lambda: wall_s(lambda: read_documents(prefix, places))),
        "their documents": (DOCUMENTS, lambda: wall_s(lambda: megatron_core.read_documents(prefix, places))),
        "packs": (STEPS * BATCH, lambda: wall_s(lambda: read_steps(prefix, tokenizer, step, near, 0, STEPS))),
        "their packs": (STEPS * BATCH, lambda: wall_s(lambda: theirs(0, STEPS * BATCH))),
        "first": (1, lambda: wall_s(lambda: read_steps(prefix, tokenizer, step, None, 0, 1))),
        "their first": (1, lambda: _empty(cache) or wall_s(lambda: theirs(0, BATCH))),
        "resume at 0": (1, lambda: wall_s(lambda: read_steps(prefix, tokenizer, step, near, 0, 1))),
        "resume": (1, lambda: wall_s(lambda: read_steps(prefix, tokenizer, step, far, step, 1))),
        "their resume": (1, lambda: wall_s(lambda: theirs((step - 1) * BATCH, BATCH))),
    }
    timings = interleave(setting.repetitions, works)
    yield "\n".join(_lines(timings, anew_s, setting))


def _lines(timings: dict[str, Timing], anew_s: float, setting: Setting) -> list[str]:
    reading = [
        Row("documents at random", timings["documents"], "IndexedDataset of megatron-core", timings["their documents"]),
        Row(f"packs of {SEQ_LEN} tokens, step after step", timings["packs"], "its GPTDataset", timings["their packs"]),
    ]
    starting = [
        Row("first batch", timings["first"], "GPTDataset without its cache", timings["their first"]),
        Row(
            f"resume at step {setting.resume_at:,}",
            timings["resume"],
            "GPTDataset with its cache",
            timings["their resume"],
        ),
        Row(
            f"resume at step {setting.resume_at:,}", timings["resume"], "resume at step 0", timings["resume at 0"], "1"
        ),
    ]
    return [
        "### Packed access",
        "",
        f"{setting.megabytes:.0f} MB of text, batches of {BATCH} packs, best of {setting.repetitions}. megavl packs "
        "whole documents and knows their borders; GPTDataset concatenates and cuts.",
        "",
        *table(reading, "samples/s", lambda timing: f"{timing.rate:,.0f}"),
        "",
        *table(starting, "ms", lambda timing: f"{min(timing.seconds) * 1e3:.0f}"),
        "",
        f"Without a saved position, step {setting.resume_at:,} is found anew in {anew_s:.1f} s.",
    ]


def open_sampler(prefix: Path, tokenizer: Path, resume_at: int) -> Sampler:
    """Steps of text packs, as a run has them."""
    data = DataConfig(
        tokenizer=str(tokenizer),
        text=(SourceConfig(prefix=str(prefix)),),
        text_ratio=TextRatioConfig(final=1.0),
        seq_len=SEQ_LEN,
        workers=0,
    )
    return Sampler(data, PRESETS["vl_1b"], TrainConfig(steps=resume_at + STEPS, global_batch=BATCH))


def read_steps(prefix: Path, tokenizer: Path, resume_at: int, position: dict | None, first: int, steps: int) -> None:
    """What a run does until it has so many batches: open everything, go to the position, read."""
    sampler = open_sampler(prefix, tokenizer, resume_at)
    if position is not None:
        sampler.resume(position)
    loader = Loader(sampler, dp_rank=0, dp_size=1, images=None, first_step=first)
    for _ in islice(loader, steps):
        pass


def read_documents(prefix: Path, places: list[int]) -> None:
    """All tokens of each document."""
    store = Store(str(prefix))
    for document in places:
        for sequence in store.sequences(document):
            store.text(sequence, 0, int(store.lengths[sequence]))


def _empty(directory: Path) -> None:
    shutil.rmtree(directory, ignore_errors=True)
