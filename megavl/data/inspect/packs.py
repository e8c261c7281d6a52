"""Packs as a run will train on them, with the loss mask that the loader makes."""

from collections.abc import Iterator, Sequence

import numpy as np

from megavl.batch import Kind
from megavl.config.model import ModelConfig
from megavl.config.run import DataConfig, SourceConfig, TrainConfig
from megavl.config.tiles import Tiling
from megavl.config.tokens import IGNORE_INDEX
from megavl.data.assemble import Assembler
from megavl.data.format import PROMPT
from megavl.data.inspect.sample import images_of, spell
from megavl.data.inspect.shown import PackedPiece, PackSample, Part, Role, TextPart
from megavl.data.pack import Pack, Piece
from megavl.data.sampler import Sampler
from megavl.data.store import Store
from megavl.data.tokenizer import Tokenizer

# Steps of a run that is only imagined: enough that both kinds are among them.
_STEPS = 64


def run_over(
    stores: Sequence[Store], tokenizer: str, model: ModelConfig, seq_len: int, packs: int, seed: int
) -> Sampler:
    """The samples of a run over some datasets with equal weights, half of its steps text where there are both kinds.

    Raises:
        DataError: what a run would end with, such as an image that is longer than a pack.
    """
    text, multimodal = (
        tuple(SourceConfig(prefix=store.prefix) for store in stores if store.multimodal == kind)
        for kind in (False, True)
    )
    ratio = 0.5 if text and multimodal else float(bool(text))
    data = DataConfig(tokenizer=tokenizer, text=text, multimodal=multimodal, text_ratio=ratio, seq_len=seq_len)
    return Sampler(data, model, TrainConfig(steps=_STEPS, global_batch=packs, seed=seed))


def planned(sampler: Sampler, tokenizer: Tokenizer, first_step: int, packs: int) -> Iterator[PackSample]:
    """The first packs of the first text step and of the first multimodal step from `first_step` on.

    A kind that no step of the run has is left out.

    Raises:
        DataError: a document cannot be read.
    """
    waiting = {kind for kind, stores in sampler.stores.items() if stores}
    for step in range(first_step, sampler.train.steps):
        plan = sampler.plan(step)
        if plan.kind in waiting:
            waiting.remove(plan.kind)
            for number, pack in enumerate(plan.packs[:packs]):
                yield _read(sampler, tokenizer, step, plan.kind, number, pack)
        if not waiting:
            return


def _read(sampler: Sampler, tokenizer: Tokenizer, step: int, kind: Kind, number: int, pack: Pack) -> PackSample:
    seq_len = sampler.data.seq_len
    assembler = Assembler(sampler.stores, sampler.model, seq_len, sampler.eos, images=None)
    labels = assembler(kind, number, [pack]).batch.labels.numpy()
    pieces, start = [], 0
    for piece in pack:
        store = sampler.stores[kind][piece.source]
        mine = labels[start : start + piece.tokens]
        pieces.append(_piece(store, piece, mine, sampler.tiling, tokenizer))
        start += piece.tokens
    return PackSample(
        step=step,
        kind=kind,
        number=number,
        seq_len=seq_len,
        max_tiles=sampler.data.max_tiles,
        tiles=sum(piece.tiles for piece in pack),
        target_tokens=int((labels != IGNORE_INDEX).sum()),
        pieces=tuple(pieces),
    )


def _piece(store: Store, piece: Piece, labels: np.ndarray, tiling: Tiling, tokenizer: Tokenizer) -> PackedPiece:
    # Label t is token t + 1: a token is learned where the position before it has a label.
    learned = np.concatenate(([False], labels[:-1] != IGNORE_INDEX))
    images = images_of(store, piece.document, tiling)
    parts: list[tuple[int, Part]] = []
    offset = 0
    for sequence in store.sequences(piece.document):
        length = images[sequence].tokens if sequence in images else int(store.lengths[sequence])
        first, last = max(offset, piece.start), min(offset + length, piece.stop)
        if first < last:
            part = images.get(sequence) or _text(
                store,
                piece.document,
                sequence,
                slice(first - offset, last - offset),
                learned[first - piece.start : last - piece.start],
                tokenizer,
            )
            parts.append((last - first, part))
        offset += length
    beyond = int(labels[-1])
    return PackedPiece(
        store=store,
        document=piece.document,
        key=store.key(piece.document),
        start=piece.start,
        stop=piece.stop,
        document_tokens=offset,
        parts=tuple(parts),
        beyond=None if beyond == IGNORE_INDEX else (beyond, spell(store, piece.document, [beyond], tokenizer)[0]),
    )


def _text(
    store: Store, document: int, sequence: int, place: slice, learned: np.ndarray, tokenizer: Tokenizer
) -> TextPart:
    ids = store.text(sequence, place.start, place.stop).tolist()
    other = Role.PROMPT if store.modes[sequence] == PROMPT else Role.NEVER
    roles = tuple(Role.TARGET if target else other for target in learned.tolist())
    return TextPart(tuple(ids), spell(store, document, ids, tokenizer), roles)
