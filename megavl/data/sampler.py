"""Sampler: what every step trains on, decided from the configuration and the lengths of the documents alone.

A step is all text or all multimodal (DeepSeek-VL section 4.4, modality grouping). Its kind is drawn by (seed, step);
the n-th step of a kind takes the packs n * global_batch onwards of that modality's stream. Nothing here knows ranks,
micro-batches or worker processes, so none of them can change the samples.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from megavl.config.data_rules import sampler_problems
from megavl.config.model import ModelConfig
from megavl.config.run import DataConfig, SourceConfig, TrainConfig
from megavl.config.tiles import Tiling
from megavl.config.tokens import PLACEHOLDERS
from megavl.data.errors import DataError
from megavl.data.kinds import text_steps
from megavl.data.ledger import Entry, Ledger
from megavl.data.pack import Pack
from megavl.data.store import Store
from megavl.data.stream import Stream, Use
from megavl.data.template import OF_A_FAMILY
from megavl.data.tokenizer import Tokenizer, load_tokenizer

if TYPE_CHECKING:  # a dry run samples without torch, which megavl.batch imports
    from megavl.batch import Kind

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
    tiles: int
    squared_tokens: int


class Sampler:
    """The samples of a run. Every rank builds one, checks the same things and fails alike."""

    def __init__(self, data: DataConfig, model: ModelConfig, train: TrainConfig) -> None:
        """Open and check everything that the run will read.

        Raises:
            DataError: a dataset or the tokenizer is missing, damaged or of the wrong kind; a dataset was made with
                another tokenizer, or for models of the other family; the vocabulary, the image's token or an image does
                not fit the model or the pack; `text_ratio` needs a modality that has no source; a source would be read
                more often than its `max_epochs`.
        """
        if problems := sampler_problems(data, model):
            raise DataError("\n".join(problems))
        tokenizer = load_tokenizer(data.tokenizer)
        if tokenizer.vocab_size > model.decoder.vocab_size:
            raise DataError(
                f"tokenizer {data.tokenizer} has {tokenizer.vocab_size} tokens, but model.decoder.vocab_size is "
                f"{model.decoder.vocab_size}; the largest ids would have no embedding; enlarge the model's "
                "vocabulary or choose the model's own tokenizer"
            )
        _check_placeholder(data, model, tokenizer)
        self.data, self.model, self.train = data, model, train
        self.eos, self.tiling = tokenizer.eos, Tiling(model)
        self._sources: dict[Kind, tuple[SourceConfig, ...]] = {"text": data.text, "multimodal": data.multimodal}
        self.stores: dict[Kind, tuple[Store, ...]] = {
            "text": tuple(_open(source, False, data, model, tokenizer) for source in data.text),
            "multimodal": tuple(_open(source, True, data, model, tokenizer) for source in data.multimodal),
        }
        self._streams: dict[Kind, Stream] = {
            "text": self._stream("text", _TEXT),
            "multimodal": self._stream("multimodal", _MULTIMODAL),
        }
        is_text = text_steps(data.text_ratio, train.steps, (train.seed, _KINDS))
        # Entry s counts the text steps before step s.
        self._text_steps = np.concatenate(([0], np.cumsum(is_text)))
        self._refuse_repeats()

    def plan(self, step: int) -> StepPlan:
        """The global batch of a step in 0..train.steps-1; the same whenever and wherever it is asked.

        Raises:
            DataError: nothing in the step is supervised.
        """
        kind: Kind = "text" if self.steps("text", step + 1) > self.steps("text", step) else "multimodal"
        packs = tuple(self._streams[kind].packs(self._packs(kind, step), self._packs(kind, step + 1)))
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
            tiles=sum(piece.tiles for piece in pieces),
            squared_tokens=sum(piece.tokens**2 for piece in pieces),
        )

    def steps(self, kind: Kind, step: int) -> int:
        """How many of the steps before `step` are of a kind."""
        text = int(self._text_steps[step])
        return text if kind == "text" else step - text

    def position(self, step: int) -> dict[str, dict]:
        """Where the streams stand before a step, in JSON types, for `resume` of another run's sampler."""
        return {kind: self._streams[kind].position(self._packs(kind, step)) for kind in self._sampled()}

    def resume(self, position: dict[str, dict]) -> list[Kind]:
        """Go on from a position at once. Returns the kinds whose packs are other ones than where it was taken, or of
        which it says nothing: they are packed again from the first one on, from lengths alone."""
        return [
            kind for kind in self._sampled() if kind not in position or not self._streams[kind].resume(position[kind])
        ]

    def expected(self) -> Ledger:
        """What the whole run will read: its steps exactly, the rest by the weights and the first packs."""
        return self._ledger(self.train.steps, Stream.expect)

    def read(self, step: int) -> Ledger:
        """What is read before a step, exactly."""
        return self._ledger(step, Stream.read)

    def _ledger(self, step: int, uses_of: Callable[[Stream, int], list[Use]]) -> Ledger:
        filled, entries = {}, []
        for kind in self._sampled():
            packs = self._packs(kind, step)
            uses = uses_of(self._streams[kind], packs)
            tokens = sum(use.tokens for use in uses)
            if packs:
                filled[kind] = tokens / (packs * self.data.seq_len)
            for source, store, use in zip(self._sources[kind], self.stores[kind], uses, strict=True):
                share = use.tokens / tokens if tokens else 0.0
                epochs = use.documents / len(store)
                entries.append(Entry(kind, source.prefix, share, use.documents, use.tokens, epochs))
        return Ledger(step, self.steps("text", step), filled, tuple(entries))

    def _sampled(self) -> list[Kind]:
        """The kinds that have sources."""
        return [kind for kind, sources in self._sources.items() if sources]

    def _packs(self, kind: Kind, step: int) -> int:
        """Packs of a kind before a step."""
        return self.steps(kind, step) * self.train.global_batch

    def _refuse_repeats(self) -> None:
        limits = [source.max_epochs for kind in self._sampled() for source in self._sources[kind]]
        if not any(limits):
            return
        problems = [
            f"the run would read dataset {entry.source} {entry.epochs:.2f} times ({entry.share:.2%} of the tokens of "
            f"its {entry.kind} steps), but its max_epochs is {limit:g}; lower its weight, shorten the run, or raise "
            "max_epochs"
            for entry, limit in zip(self.expected().entries, limits, strict=True)
            if limit is not None and entry.epochs > limit
        ]
        if problems:
            raise DataError("\n".join(problems))

    def _stream(self, kind: Kind, modality: int) -> Stream:
        weights = tuple(source.weight for source in self._sources[kind])
        return Stream(
            self.stores[kind],
            weights,
            self.data.seq_len,
            self.tiling,
            key=(self.train.seed, modality),
            max_tiles=self.data.max_tiles,
        )


def _check_placeholder(data: DataConfig, model: ModelConfig, tokenizer: Tokenizer) -> None:
    spelling = PLACEHOLDERS[model.family]
    token = tokenizer.special.get(spelling, model.image_token_id)
    if token != model.image_token_id:
        raise DataError(
            f"tokenizer {data.tokenizer} has {spelling}, the place of an image in models of the family {model.family}, "
            f"as token {token}, but model.image_token_id is {model.image_token_id}: an export would put its images at "
            f"another token; set model.image_token_id to {token}, or choose the model's own tokenizer"
        )


def _open(source: SourceConfig, multimodal: bool, data: DataConfig, model: ModelConfig, tokenizer: Tokenizer) -> Store:
    store = Store(source.prefix)
    if (store.meta.images > 0) != multimodal:
        kinds = {True: "multimodal", False: "text"}
        raise DataError(
            f"dataset {source.prefix} holds {store.meta.images} images, but data.{kinds[multimodal]} lists it; list it "
            f"under data.{kinds[not multimodal]}: a step is all text or all multimodal"
        )
    name = f"data.tokenizer {data.tokenizer}"
    if other := store.meta.other_tokenizer(name, tokenizer.identity, tokenizer.vocab_size):
        raise DataError(
            f"dataset {source.prefix} {other}; its ids would mean other words; point data.tokenizer at the file that "
            "made it, or make the dataset again"
        )
    if foreign := set(store.meta.templates) & set(OF_A_FAMILY) - {model.family}:
        raise DataError(
            f"dataset {source.prefix} holds conversations of the template {foreign.pop()}, but {model.name} is a model "
            f"of the family {model.family}: it would learn the turns of another family, which its own prompts never "
            f"have; make the dataset again with `--template {model.family}`, or choose a model of that family"
        )
    return store
