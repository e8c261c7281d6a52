"""Packs as they are shown, against the batches and the plan of the run."""

import pytest

from megavl.config.load import load_run
from megavl.config.run import SourceConfig
from megavl.data.inspect.packs import planned, run_over
from megavl.data.inspect.shown import ImagePart, Role, TextPart
from megavl.data.sampler import Sampler
from megavl.data.store import Store
from megavl.data.tokenizer import load_tokenizer


def targets(pack) -> int:
    """Learned tokens that are shown, those from behind a cut included."""
    parts = [part for piece in pack.pieces for _, part in piece.parts if isinstance(part, TextPart)]
    return sum(part.roles.count(Role.TARGET) for part in parts) + sum(piece.beyond is not None for piece in pack.pieces)


@pytest.mark.parametrize(("family", "seq_len"), [("vl", 24), ("vl", 96), ("vl2", 32), ("vl2", 96)])
def test_packs_are_those_of_the_plan(corpus, model, tiled_model, train, family, seq_len):
    data = corpus.data(seq_len=seq_len, text=(SourceConfig(prefix=corpus.prefix("text")),))
    sampler = Sampler(data, {"vl": model, "vl2": tiled_model}[family], train)
    tokenizer = load_tokenizer(corpus.tokenizer)
    packs = list(planned(sampler, tokenizer, 0, 100))
    assert {pack.kind for pack in packs} == {"text", "multimodal"}
    for step in {pack.step for pack in packs}:
        plan, mine = sampler.plan(step), [pack for pack in packs if pack.step == step]
        assert [pack.number for pack in mine] == list(range(train.global_batch))
        assert sum(targets(pack) for pack in mine) == plan.supervised_tokens
        assert sum(pack.target_tokens for pack in mine) == plan.supervised_tokens
        for pack, pieces in zip(mine, plan.packs, strict=True):
            assert [(one.document, one.start, one.stop) for one in pack.pieces] == [
                (piece.document, piece.start, piece.stop) for piece in pieces
            ]
            for shown, piece in zip(pack.pieces, pieces, strict=True):
                assert sum(tokens for tokens, _ in shown.parts) == piece.tokens
                images = [(tokens, part) for tokens, part in shown.parts if isinstance(part, ImagePart)]
                assert len(images) == piece.images and sum(part.grid.tiles for _, part in images) == piece.tiles
                for tokens, part in images:
                    assert tokens == part.tokens == len(sampler.tiling.layout(part.grid))
            assert pack.tiles == sum(piece.tiles for piece in pieces)
    cut = [piece for pack in packs for piece in pack.pieces if piece.stop < piece.document_tokens]
    assert cut


def test_a_prompt_is_read_only_and_the_first_token_never_a_target(gallery):
    config = load_run(gallery.recipe)
    sampler = Sampler(config.data, config.model, config.train)
    packs = planned(sampler, gallery.tokenizer, 0, 8)
    pieces = {piece.document: piece for pack in packs for piece in pack.pieces}
    prompt, image, answer = (part for _, part in pieces[1].parts)
    assert set(prompt.roles) == {Role.PROMPT} and isinstance(image, ImagePart) and set(answer.roles) == {Role.TARGET}
    ((_, long),) = pieces[3].parts
    assert long.roles[0] is Role.NEVER and set(long.roles[1:]) == {Role.TARGET}


def test_what_lies_behind_a_cut_is_shown(gallery):
    config = load_run(gallery.recipe)
    sampler = Sampler(config.data, config.model, config.train)
    pieces = [piece for pack in planned(sampler, gallery.tokenizer, 0, 8) for piece in pack.pieces]
    parts = sorted((piece for piece in pieces if piece.document == 3), key=lambda piece: piece.start)
    assert parts[0].stop < parts[0].document_tokens == 300
    token, text = parts[0].beyond
    assert token == gallery.store.text(gallery.store.sequences(3)[0], parts[0].stop, parts[0].stop + 1)[0]
    assert text == gallery.tokenizer.decode([token])


def test_a_run_that_is_only_imagined(corpus, model):
    stores = [Store(corpus.prefix(name)) for name in ("text", "more", "multimodal")]
    sampler = run_over(stores, corpus.tokenizer, model, 96, packs=3, seed=0)
    packs = list(planned(sampler, load_tokenizer(corpus.tokenizer), 0, 3))
    assert [(pack.kind, pack.number) for pack in sorted(packs, key=lambda pack: (pack.kind, pack.number))] == [
        *(("multimodal", number) for number in range(3)),
        *(("text", number) for number in range(3)),
    ]
    only_text = run_over(stores[:2], corpus.tokenizer, model, 96, packs=3, seed=0)
    assert {pack.kind for pack in planned(only_text, load_tokenizer(corpus.tokenizer), 0, 3)} == {"text"}
