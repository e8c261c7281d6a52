import json
import os

import pytest
import sentencepiece

from megavl.config.run import SourceConfig, TextRatioConfig, TrainConfig
from megavl.data.build import build
from megavl.data.encoded import EncodedDocument, EncodedImage
from megavl.data.errors import DataError
from megavl.data.sampler import Sampler
from megavl.data.tokenizer import load_tokenizer
from megavl.data.writer import StoreWriter
from tests.data.conftest import encoded_text, image_bytes, write_jsonl
from tests.models import changed


def test_a_plan_is_a_pure_function_of_seed_and_step(corpus, model, train):
    plans = [Sampler(corpus.data(), model, train).plan(step) for step in range(train.steps)]
    backwards = Sampler(corpus.data(), model, train)
    assert [backwards.plan(step) for step in reversed(range(train.steps))] == plans[::-1]
    longer = Sampler(corpus.data(), model, changed(train, steps=50))
    assert [longer.plan(step) for step in range(train.steps)] == plans
    other = Sampler(corpus.data(), model, changed(train, seed=8))
    assert [other.plan(step) for step in range(train.steps)] != plans


def test_steps_of_a_kind_take_consecutive_packs(corpus, model, train):
    sampler = Sampler(corpus.data(), model, train)
    plans = [sampler.plan(step) for step in range(train.steps)]
    assert {plan.kind for plan in plans} == {"text", "multimodal"}
    for kind in ("text", "multimodal"):
        packs = [pack for plan in plans if plan.kind == kind for pack in plan.packs]
        assert packs == sampler._streams[kind].packs(0, len(packs))
        assert sampler.steps(kind, train.steps) == sum(plan.kind == kind for plan in plans)


def test_a_schedule_decides_the_kinds(corpus, model):
    train = TrainConfig(steps=100, global_batch=1)
    ratio = TextRatioConfig(start=1.0, final=0.0, steps=60, shape="step", milestones=(1.0,))
    sampler = Sampler(corpus.data(text_ratio=ratio), model, train)
    assert [sampler.plan(step).kind for step in (0, 59, 60, 99)] == ["text", "text", "multimodal", "multimodal"]
    assert (sampler.steps("text", 100), sampler.steps("multimodal", 100)) == (60, 40)


def test_a_plan_counts_what_its_packs_hold(corpus, model, train):
    sampler = Sampler(corpus.data(), model, train)
    for step in range(train.steps):
        plan = sampler.plan(step)
        assert len(plan.packs) == train.global_batch
        pieces = [piece for pack in plan.packs for piece in pack]
        assert plan.tokens == sum(piece.stop - piece.start for piece in pieces) <= 96 * train.global_batch
        assert plan.squared_tokens == sum((piece.stop - piece.start) ** 2 for piece in pieces)
        assert (plan.images > 0) == (plan.kind == "multimodal")


def test_one_modality_alone_is_enough_where_the_ratio_says_so(corpus, model, train):
    plans = Sampler(corpus.data(multimodal=(), text_ratio=1), model, train)
    assert {plans.plan(step).kind for step in range(train.steps)} == {"text"}
    plans = Sampler(corpus.data(text=(), text_ratio=0), model, train)
    assert {plans.plan(step).kind for step in range(train.steps)} == {"multimodal"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer": "absent.model"}, "absent.model: no such file"),
        ({"text": (SourceConfig(prefix="absent/prefix"),)}, "dataset absent/prefix: .* not found"),
    ],
)
def test_a_configuration_that_cannot_be_sampled_is_refused(corpus, model, train, changes, message):
    with pytest.raises(DataError, match=message):
        Sampler(corpus.data(**changes), model, train)


def test_a_store_listed_under_the_other_modality_is_refused(corpus, model, train):
    source = (SourceConfig(prefix=corpus.prefix("multimodal")),)
    with pytest.raises(DataError, match="holds 65 images, but data.text lists it; list it under data.multimodal"):
        Sampler(corpus.data(text=source), model, train)


@pytest.mark.parametrize("kind", ["text", "multimodal"])
@pytest.mark.parametrize("template", ["vl", "vl2", "plain"])
def test_conversations_of_the_other_family_are_refused(corpus, model, tiled_model, train, tmp_path, kind, template):
    picture = EncodedImage(image_bytes(0, (40, 30)), 40, 30)
    sequences = (encoded_text(1, 2), *([picture] if kind == "multimodal" else []))
    with StoreWriter(str(tmp_path / "p"), load_tokenizer(corpus.tokenizer)) as writer:
        writer.add(EncodedDocument("key", "file", sequences, template))
    data = corpus.data(**{kind: (SourceConfig(prefix=str(tmp_path / "p")),)})
    for one in (model, tiled_model):
        if template in (one.family, "plain"):
            Sampler(data, one, train)
            continue
        with pytest.raises(DataError) as error:
            Sampler(data, one, train)
        assert str(error.value) == (
            f"dataset {tmp_path / 'p'} holds conversations of the template {template}, but data is a model of the "
            f"family {one.family}: it would learn the turns of another family, which its own prompts never have; make "
            f"the dataset again with `--template {one.family}`, or choose a model of that family"
        )


def test_a_tokenizer_with_the_placeholder_at_another_id_is_refused(corpus, model, tiled_model, train, monkeypatch):
    """Each family has its own spelling; the other's says nothing."""
    known = load_tokenizer(corpus.tokenizer)
    monkeypatch.setattr("megavl.data.sampler.load_tokenizer", lambda path: known)
    for spelling, refused in (("<image_placeholder>", model), ("<image>", tiled_model)):
        known.special = {spelling: 17}
        with pytest.raises(DataError, match=f"has {spelling}, .* as token 17, but model.image_token_id is 399: .* 17,"):
            Sampler(corpus.data(), refused, train)
        Sampler(corpus.data(), tiled_model if refused is model else model, train)
        known.special = {spelling: 399}
        Sampler(corpus.data(), refused, train)


def test_a_store_of_another_tokenizer_is_refused(corpus, model, train, tmp_path):
    path = write_jsonl(tmp_path / "in.jsonl", [{"text": "a b c"}])
    other = tmp_path / "other.model"
    sentencepiece.SentencePieceTrainer.train(
        input=path, model_prefix=str(tmp_path / "other"), vocab_size=50, hard_vocab_limit=False, minloglevel=2
    )
    build([path], str(tmp_path / "p"), str(other))
    with pytest.raises(DataError, match="was made with another tokenizer"):
        Sampler(corpus.data(text=(SourceConfig(prefix=str(tmp_path / "p")),)), model, train)


def test_a_vocabulary_that_the_model_lacks_is_refused(corpus, model, train):
    small = changed(model, decoder={"vocab_size": 64}, image_token_id=63)
    with pytest.raises(DataError, match="tokens, but model.decoder.vocab_size is 64"):
        Sampler(corpus.data(), small, train)


def test_a_step_without_a_target_is_refused(corpus, model, train, tmp_path):
    tokenizer = load_tokenizer(corpus.tokenizer)
    with StoreWriter(str(tmp_path / "p"), tokenizer) as writer:
        writer.add(EncodedDocument("only the end", "file", (encoded_text(tokenizer.eos),)))
    data = corpus.data(text=(SourceConfig(prefix=str(tmp_path / "p")),), multimodal=(), text_ratio=1)
    with pytest.raises(DataError, match="step 3 \\(text\\): none of its .* holds a text token to predict"):
        Sampler(data, model, train).plan(3)


def blended(corpus, **changes):
    """Two text sources, the second with four fifths of the tokens, and one multimodal source."""
    sources = (
        SourceConfig(prefix=corpus.prefix("text"), weight=1),
        SourceConfig(prefix=corpus.prefix("more"), weight=4),
    )
    return corpus.data(text=sources, **changes)


def test_the_ledger_is_what_the_steps_hold(corpus, model):
    train = TrainConfig(steps=60, global_batch=24, seed=3)
    sampler = Sampler(blended(corpus), model, train)
    read, plans = sampler.read(40), [sampler.plan(step) for step in range(40)]
    assert read.steps == 40 and read.text_steps == sum(plan.kind == "text" for plan in plans)
    assert [(entry.kind, entry.source) for entry in read.entries] == [
        ("text", corpus.prefix("text")),
        ("text", corpus.prefix("more")),
        ("multimodal", corpus.prefix("multimodal")),
    ]
    for kind, number in (("text", 0), ("text", 1), ("multimodal", 0)):
        plans_of_kind = [plan for plan in plans if plan.kind == kind]
        pieces = [p for plan in plans_of_kind for pack in plan.packs for p in pack if p.source == number]
        entry = read.entries[number if kind == "text" else 2]
        assert entry.documents == sum(piece.start == 0 for piece in pieces)
        assert entry.tokens == sum(piece.tokens for piece in pieces)
        assert entry.epochs == entry.documents / len(sampler.stores[kind][number])
        assert entry.share == entry.tokens / sum(plan.tokens for plan in plans_of_kind)
    assert read.entries[1].share == pytest.approx(0.8, abs=0.01)
    for kind, filled in read.filled.items():
        plans_of_kind = [plan for plan in plans if plan.kind == kind]
        assert filled == sum(plan.tokens for plan in plans_of_kind) / (24 * 96 * len(plans_of_kind))


def test_the_ledger_expects_what_is_read_in_the_end(corpus, model):
    sampler = Sampler(blended(corpus), model, TrainConfig(steps=150, global_batch=24))
    expected, read = sampler.expected(), sampler.read(150)
    assert (expected.steps, expected.text_steps) == (read.steps, read.text_steps)
    for one, other in zip(expected.entries, read.entries, strict=True):
        assert one.epochs == pytest.approx(other.epochs, rel=0.03)
        assert one.share == pytest.approx(other.share, abs=0.01)
    lines = str(expected).splitlines()
    assert lines[0].startswith(f"{read.text_steps} text and {150 - read.text_steps} multimodal steps")
    assert "packs filled to 9" in lines[0] and len(lines) == 5 and corpus.prefix("more") in lines[3]


def test_a_run_that_would_repeat_a_source_too_often_is_refused(corpus, model):
    train = TrainConfig(steps=20, global_batch=12)
    epochs = [entry.epochs for entry in Sampler(corpus.data(), model, train).expected().entries]

    def limited(text, multimodal):
        return corpus.data(
            text=(SourceConfig(prefix=corpus.prefix("text"), max_epochs=text),),
            multimodal=(SourceConfig(prefix=corpus.prefix("multimodal"), max_epochs=multimodal),),
        )

    Sampler(limited(epochs[0] * 1.01, epochs[1] * 1.01), model, train)
    with pytest.raises(DataError) as error:
        Sampler(limited(epochs[0] * 0.99, None), model, train)
    assert (
        f"would read dataset {corpus.prefix('text')} {epochs[0]:.2f} times (100.00% of the tokens of its text steps)"
        in (str(error.value))
    )
    with pytest.raises(DataError) as error:
        Sampler(limited(epochs[0] / 2, epochs[1] / 2), model, train)
    assert len(str(error.value).splitlines()) == 2


@pytest.mark.parametrize("step", [1, 20, 59])
def test_a_position_goes_on_from_any_step(corpus, model, step):
    train = TrainConfig(steps=60, global_batch=24, seed=3)
    whole = Sampler(blended(corpus), model, train)
    expected = [whole.plan(number) for number in range(60)]
    position = json.loads(json.dumps(whole.position(step)))
    resumed, anew = Sampler(blended(corpus), model, train), Sampler(blended(corpus), model, train)
    assert resumed.resume(position) == [] and anew.resume({}) == ["text", "multimodal"]
    for sampler in (resumed, anew):
        assert [sampler.plan(number) for number in range(step, 60)] == expected[step:]
        assert sampler.read(step) == whole.read(step)


def test_a_position_holds_for_the_streams_that_are_the_same(corpus, model):
    train = TrainConfig(steps=60, global_batch=24)
    position = Sampler(blended(corpus), model, train).position(30)
    other = Sampler(corpus.data(), model, train)
    assert other.resume(position) == ["text"]
    # The packs of a stream depend neither on how many make a step nor on how often its kind has its turn.
    other = Sampler(blended(corpus, text_ratio=0.2), model, changed(train, global_batch=12))
    assert other.resume(position) == []
    expected = Sampler(blended(corpus, text_ratio=0.2), model, changed(train, global_batch=12))
    assert [other.plan(step) for step in (3, 59)] == [expected.plan(step) for step in (3, 59)]


def test_another_prefix_of_the_same_dataset_is_the_same_stream(corpus, model, train, tmp_path):
    for suffix in (".bin", ".idx", ".meta"):
        os.symlink(corpus.prefix("text") + suffix, tmp_path / f"moved{suffix}")
    moved = corpus.data(text=(SourceConfig(prefix=str(tmp_path / "moved")),))
    assert Sampler(moved, model, train).resume(Sampler(corpus.data(), model, train).position(5)) == []
