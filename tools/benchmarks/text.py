"""Text: tools/preprocess_data.py against the tokenizer alone, called in a loop in as many processes."""

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

import gigatoken
import sentencepiece
import tokenizers
from benchmarks.commands import megatron, preprocess
from benchmarks.documents import read_texts, write_corpus, write_deepseek, write_sentencepiece
from benchmarks.measure import Row, Setting, Timing, interleave, race_s, table, wall_s

from megavl.data.encode import encode
from megavl.data.readers import jsonl
from megavl.data.readers.reader import ReadOptions
from megavl.data.tokenizer import Tokenizer, load_tokenizer
from megavl.data.writer import StoreWriter

# Texts that gigatoken's threads get at a time.
_BATCH = 256
_PROFILED_BYTES = 16 << 20
T = TypeVar("T")


def run(setting: Setting) -> Iterator[str]:
    """Sections in Markdown."""
    corpus = write_corpus(setting.directory / "text.jsonl", setting.megabytes * 1e6)
    model = write_sentencepiece(corpus, setting.directory / "tokenizer.model")
    yield _section("sentencepiece", corpus, model, setting)
    model = write_deepseek(corpus, setting.directory / "hf" / "tokenizer.json")
    yield _section("tokenizer.json", corpus, model, setting)


def _section(kind: str, corpus: Path, tokenizer: Path, setting: Setting) -> str:
    size_bytes = corpus.stat().st_size
    one = setting.directory / "one.jsonl"
    with corpus.open("rb") as file:
        one.write_bytes(file.readline())
    shares = [(tokenizer, corpus, number, setting.workers) for number in range(setting.workers)]

    def mine_s(corpus: Path, *options: str) -> float:
        return wall_s(lambda: preprocess(corpus, setting.directory / "megavl", tokenizer, setting.workers, *options))

    def theirs_s(corpus: Path) -> float:
        prefix = setting.directory / "megatron"
        return wall_s(lambda: megatron(setting.megatron, corpus, prefix, tokenizer, setting.workers))

    works = {
        "plain loop": (size_bytes, lambda: race_s(plain_loop, shares)),
        "gigatoken loop": (size_bytes, lambda: race_s(fast_loop, shares)),
        "gigatoken loop, its own threads": (size_bytes, lambda: race_s(threaded_loop, shares)),
        "start": (0, lambda: mine_s(one)),
        "plain": (size_bytes, lambda: mine_s(corpus, "--plain-tokenizer")),
        "fast": (size_bytes, lambda: mine_s(corpus)),
    }
    if setting.megatron:
        works["Megatron's start"] = (0, lambda: theirs_s(one))
        works["Megatron"] = (size_bytes, lambda: theirs_s(corpus))
    timings = interleave(setting.repetitions, works)
    start_s = min(timings["start"].seconds)
    lines = [
        f"### Text, {kind}",
        "",
        f"{size_bytes / 1e6:.0f} MB of JSON lines, {setting.workers} processes, best of {setting.repetitions}. "
        f"Without the start of the command, which takes {start_s:.1f} s.",
        "",
        *table(_rows(timings), "MB/s", lambda timing: f"{timing.rate / 1e6:.1f}"),
        "",
        *_profile(corpus, tokenizer, setting.directory),
    ]
    return "\n".join([*lines, "", _same_bytes(setting.directory)] if setting.megatron else lines)


def _rows(timings: dict[str, Timing]) -> list[Row]:
    plain, fast = timings["plain"].after(timings["start"]), timings["fast"].after(timings["start"])
    loop, fast_loop = timings["plain loop"], timings["gigatoken loop"]
    threads = timings["gigatoken loop, its own threads"]
    rows = [
        Row("preprocess_data without gigatoken", plain, "the plain tokenizer in a loop", loop, "0.9"),
        Row("preprocess_data with gigatoken", fast, "the plain tokenizer in a loop", loop, "5"),
        Row("preprocess_data with gigatoken", fast, "gigatoken in a loop", fast_loop),
        Row("gigatoken in a loop", fast_loop, "the same with its own threads, in each process", threads),
    ]
    if "Megatron" in timings:
        theirs = timings["Megatron"].after(timings["Megatron's start"])
        rows += [
            Row("preprocess_data without gigatoken", plain, "Megatron-LM's preprocess_data", theirs),
            Row("preprocess_data with gigatoken", fast, "Megatron-LM's preprocess_data", theirs),
        ]
    return rows


def _same_bytes(directory: Path) -> str:
    """Whether the last files of both are alike."""
    mine, theirs = directory / "megavl", directory / "megatron_text_document"
    same = {suffix: _digest(mine, suffix) == _digest(theirs, suffix) for suffix in ("bin", "idx")}
    words = {True: "is byte for byte", False: "is NOT"}
    return "; ".join(f".{suffix} {words[same]} that of Megatron-LM" for suffix, same in same.items()) + "."


def _digest(prefix: Path, suffix: str) -> str:
    with prefix.with_name(f"{prefix.name}.{suffix}").open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def plain_loop(tokenizer: Path, corpus: Path, number: int, of: int) -> Callable[[], None]:
    """A process's share of the texts, one by one through the tokenizer's own package."""
    texts = read_texts(corpus)[number::of]
    if tokenizer.suffix == ".model":
        model = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
        return lambda: _exhaust(model.encode(text) for text in texts)
    model = tokenizers.Tokenizer.from_file(str(tokenizer))
    return lambda: _exhaust(model.encode(text, add_special_tokens=False).ids for text in texts)


def fast_loop(tokenizer: Path, corpus: Path, number: int, of: int) -> Callable[[], None]:
    """The same through gigatoken."""
    texts = read_texts(corpus)[number::of]
    model = gigatoken.Tokenizer(tokenizer)
    return lambda: _exhaust(model.encode(text) for text in texts)


def threaded_loop(tokenizer: Path, corpus: Path, number: int, of: int) -> Callable[[], None]:
    """The same by the batch, on as many threads in each process as there are cores."""
    texts = read_texts(corpus)[number::of]
    model = gigatoken.Tokenizer(tokenizer)
    model.encode_batch(texts[:1])  # imports what it returns arrays with
    batches = [texts[start : start + _BATCH] for start in range(0, len(texts), _BATCH)]
    return lambda: _exhaust(model.encode_batch(batch, parallel=True) for batch in batches)


def _exhaust(work: Iterable) -> None:
    for _ in work:
        pass


def _profile(corpus: Path, tokenizer: Path, directory: Path) -> list[str]:
    """Where one process's time goes, with the tokenizer's own package and with gigatoken."""
    plain, fast = load_tokenizer(str(tokenizer)), load_tokenizer(str(tokenizer))
    fast.accelerate()
    return ["Of one process's time:", "", _stages(corpus, plain, directory), _stages(corpus, fast, directory)]


def _stages(corpus: Path, tokenizer: Tokenizer, directory: Path) -> str:
    part = next(jsonl.split(str(corpus), _PROFILED_BYTES))
    with StoreWriter(str(directory / "profile"), tokenizer, overwrite=True) as writer:
        documents, reading_s = _timed(lambda: list(jsonl.read(part, ReadOptions())))
        texts = [segment.text for document in documents for segment in document.segments]
        _, tokenising_s = _timed(lambda: tokenizer.encode_batch(texts))
        encoded, encoding_s = _timed(lambda: encode(documents, tokenizer))
        _, writing_s = _timed(lambda: writer.add(*encoded))
    joining_s = max(0.0, encoding_s - tokenising_s)
    all_s = reading_s + tokenising_s + joining_s + writing_s
    return (
        f"- {tokenizer.backend}: reading JSON {reading_s / all_s:.0%}, tokenising {tokenising_s / all_s:.0%}, "
        f"making sequences {joining_s / all_s:.0%}, writing {writing_s / all_s:.0%}"
    )


def _timed(work: Callable[[], T]) -> tuple[T, float]:
    started = time.perf_counter()
    return work(), time.perf_counter() - started
