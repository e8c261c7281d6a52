"""Sampler: what every step trains on, decided from the configuration and the lengths of the documents alone.

A step is all text or all multimodal (DeepSeek-VL section 4.4, modality grouping). Its kind is drawn by (seed, step);
the n-th step of a kind takes the packs n * global_batch onwards of that modality's stream. Nothing here knows ranks,
micro-batches or worker processes, so none of them can change the samples.
"""

from dataclasses import dataclass

import numpy as np

from megavl.batch import Kind
from megavl.config.model import ModelConfig
from megavl.config.run import DataConfig, SourceConfig, TrainConfig
from megavl.data.errors import DataError
from megavl.data.pack import Pack
from megavl.data.store import Store
from megavl.data.stream import Stream
from megavl.data.tokenizer import Tokenizer, load_tokenizer

# Positions of the modalities in the keys of random draws: a new one goes to the end.
_TEXT, _MULTIMODAL, _KINDS = 0, 1, 2


@dataclass(frozen=True)
class StepPlan:
    """One step: the packs of its global batch, in order, and what they hold.

    tokens counts no padding; squared_tokens is the sum over pieces of their length squared.
    """

    kind: Kind
    packs: tuple[Pack, ...]
    supervised_tokens: int
    tokens: int
    images: int
    squared_tokens: int


class Sampler:
    """The samples of a run. Every rank builds one, checks the same things and fails alike."""

    def __init__(self, data: DataConfig, model: ModelConfig, train: TrainConfig) -> None:
        """Open and check everything that the run will read.

        Raises:
            DataError: a dataset or the tokenizer is missing, damaged or of the wrong kind; a dataset was made with
                another tokenizer; the vocabulary or an image does not fit the model or the pack; `text_ratio` needs a
                modality that has no source.
        """
        _check_ratio(data)
        if data.multimodal and model.image_tokens > data.seq_len:
            raise DataError(
                f"one image takes {model.image_tokens} tokens, but data.seq_len is {data.seq_len}; an image is never "
                "split; raise data.seq_len"
            )
        tokenizer = load_tokenizer(data.tokenizer)
        if tokenizer.vocab_size > model.decoder.vocab_size:
            raise DataError(
                f"tokenizer {data.tokenizer} has {tokenizer.vocab_size} tokens, but model.decoder.vocab_size is "
                f"{model.decoder.vocab_size}; the largest ids would have no embedding; enlarge the model's "
                "vocabulary or choose the model's own tokenizer"
            )
        self.data, self.model, self.train = data, model, train
        self.eos = tokenizer.eos
        self.stores: dict[Kind, tuple[Store, ...]] = {
            "text": tuple(_open(source, False, data, tokenizer) for source in data.text),
            "multimodal": tuple(_open(source, True, data, tokenizer) for source in data.multimodal),
        }
        self._streams: dict[Kind, Stream] = {
            "text": self._stream("text", data.text, _TEXT),
            "multimodal": self._stream("multimodal", data.multimodal, _MULTIMODAL),
        }
        draws = np.random.Generator(np.random.Philox(np.random.SeedSequence((train.seed, _KINDS))))
        # The first n draws do not depend on how many follow: a longer run starts with the same steps.
        self._is_text = draws.random(train.steps) < data.text_ratio

    def plan(self, step: int) -> StepPlan:
        """The global batch of a step in 0..train.steps-1; the same whenever and wherever it is asked.

        Raises:
            DataError: nothing in the step is supervised.
        """
        is_text = self._is_text[step]
        kind: Kind = "text" if is_text else "multimodal"
        size = self.train.global_batch
        first = int((self._is_text[:step] == is_text).sum()) * size
        packs = tuple(self._streams[kind].pack(number) for number in range(first, first + size))
        pieces = [piece for pack in packs for piece in pack]
        supervised = sum(piece.supervised for piece in pieces)
        if not supervised:
            raise DataError(
                f"step {step} ({kind}): none of its {len(pieces)} documents holds a text token to predict; its loss is "
                "undefined; remove empty documents from the sources"
            )
        return StepPlan(
            kind=kind,
            packs=packs,
            supervised_tokens=supervised,
            tokens=sum(piece.tokens for piece in pieces),
            images=sum(piece.images for piece in pieces),
            squared_tokens=sum(piece.tokens**2 for piece in pieces),
        )

    def _stream(self, kind: Kind, sources: tuple[SourceConfig, ...], modality: int) -> Stream:
        weights = tuple(source.weight for source in sources)
        key = (self.train.seed, modality)
        return Stream(self.stores[kind], weights, self.data.seq_len, self.model.image_tokens, key)


def _check_ratio(data: DataConfig) -> None:
    ratio = data.text_ratio
    for kind, sources, needed in (("text", data.text, ratio > 0), ("multimodal", data.multimodal, ratio < 1)):
        if needed and not sources:
            raise DataError(
                f"data.text_ratio is {ratio}, so some steps are {kind}, but data.{kind} lists no source; add one or "
                f"set data.text_ratio to {0 if kind == 'text' else 1}"
            )


def _open(source: SourceConfig, multimodal: bool, data: DataConfig, tokenizer: Tokenizer) -> Store:
    store = Store(source.prefix)
    if (store.meta.images > 0) != multimodal:
        kinds = {True: "multimodal", False: "text"}
        raise DataError(
            f"dataset {source.prefix} holds {store.meta.images} images, but data.{kinds[multimodal]} lists it; list it "
            f"under data.{kinds[not multimodal]}: a step is all text or all multimodal"
        )
    if store.meta.tokenizer != tokenizer.identity:
        raise DataError(
            f"dataset {source.prefix} was made with another tokenizer (sha256 {store.meta.tokenizer[:16]}..., "
            f"vocabulary {store.meta.vocab_size}) than data.tokenizer {data.tokenizer} (sha256 "
            f"{tokenizer.identity[:16]}..., vocabulary {tokenizer.vocab_size}); its ids would mean other words; "
            "point data.tokenizer at the file that made it, or make the dataset again"
        )
    return store
