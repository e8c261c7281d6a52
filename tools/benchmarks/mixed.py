"""Steps of real documents of mixed lengths, packed by megavl's own loader, and a small corpus to take them from."""

import ast
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from pydoc_data.topics import topics

from benchmarks.commands import preprocess
from benchmarks.padded import without_targets_beyond
from corpus.library import module_files
from train_tokenizer import train

from megavl.batch import StepBatch
from megavl.config.run import DataConfig, RunConfig, SourceConfig, TextRatioConfig
from megavl.config.tokens import IGNORE_INDEX
from megavl.data.assemble import ImageShare
from megavl.data.loader import Loader
from megavl.data.sampler import Sampler

_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def text_data(prefix: str, tokenizer: str, seq_len: int) -> DataConfig:
    """The data section of a run that reads one text dataset."""
    source = (SourceConfig(prefix=prefix),)
    return DataConfig(
        tokenizer=tokenizer, text=source, text_ratio=TextRatioConfig(final=1.0), seq_len=seq_len, workers=0
    )


def made_corpus(directory: Path, seq_len: int, vocab_size: int) -> DataConfig:
    """The documentation of Python in `directory`, with a tokenizer of `vocab_size` pieces that learned from it; made
    once in each directory.

    Raises:
        ValueError: the corpus is too small for such a vocabulary.
    """
    corpus, tokenizer, prefix = directory / "text.jsonl", directory / "tokenizer.model", directory / "text"
    data = text_data(str(prefix), str(tokenizer), seq_len)
    if tokenizer.exists():
        return data
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in _texts()), encoding="utf-8")
    train([str(corpus)], tokenizer, vocab_size, "vl")
    preprocess(corpus, prefix, tokenizer, 1)
    return data


def _texts() -> Iterator[str]:
    """Chapters of the language reference, and what the standard library says of each module, function and class with
    its methods: many short texts, few long ones."""
    yield from topics.values()
    for _, path in module_files():
        module = ast.parse(path.read_text(encoding="utf-8", errors="replace"))
        entries = [[module]] + [[node, *getattr(node, "body", ())] for node in module.body]
        for entry in entries:
            documented = [node for node in entry if isinstance(node, _DOCUMENTED)]
            if text := "\n\n".join(filter(None, map(ast.get_docstring, documented))):
                yield text


def mixed_steps(config: RunConfig, data: DataConfig, steps: int) -> Iterator[StepBatch]:
    """The first text steps of a run on `data`, in one process.

    Raises:
        DataError: the dataset or the tokenizer is missing, damaged, or not for this model.
    """
    sampler = Sampler(data, config.model, config.train.model_copy(update={"steps": steps}))
    for step in Loader(sampler, dp_rank=0, dp_size=1, images=ImageShare(), first_step=0):
        packs = tuple(map(without_targets_beyond, step.micro_batches))
        supervised = sum(int((pack.labels != IGNORE_INDEX).sum()) for pack in packs)
        yield replace(step, micro_batches=packs, supervised_tokens=supervised)
