import numpy as np
import pytest
import sentencepiece

from megavl.config.run import SourceConfig, TrainConfig
from megavl.data.build import build
from megavl.data.encoded import EncodedDocument
from megavl.data.errors import DataError
from megavl.data.sampler import Sampler
from megavl.data.tokenizer import load_tokenizer
from megavl.data.writer import StoreWriter
from tests.data.conftest import encoded_text, write_jsonl


def test_a_plan_is_a_pure_function_of_seed_and_step(corpus, model, train):
    plans = [Sampler(corpus.data(), model, train).plan(step) for step in range(train.steps)]
    backwards = Sampler(corpus.data(), model, train)
    assert [backwards.plan(step) for step in reversed(range(train.steps))] == plans[::-1]
    longer = Sampler(corpus.data(), model, train.model_copy(update={"steps": 50}))
    assert [longer.plan(step) for step in range(train.steps)] == plans
    other = Sampler(corpus.data(), model, train.model_copy(update={"seed": 8}))
    assert [other.plan(step) for step in range(train.steps)] != plans


def test_steps_of_a_kind_take_consecutive_packs(corpus, model, train):
    sampler = Sampler(corpus.data(), model, train)
    plans = [sampler.plan(step) for step in range(train.steps)]
    assert {plan.kind for plan in plans} == {"text", "multimodal"}
    for kind in ("text", "multimodal"):
        packs = [pack for plan in plans if plan.kind == kind for pack in plan.packs]
        assert packs == [sampler._streams[kind].pack(number) for number in range(len(packs))]


def test_the_share_of_text_steps_is_the_ratio(corpus, model):
    train = TrainConfig(steps=20000, global_batch=1)
    for ratio in (0.0, 0.3, 0.7, 1.0):
        is_text = Sampler(corpus.data(text_ratio=ratio), model, train)._is_text
        assert abs(is_text.mean() - ratio) < 0.011  # three standard deviations


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
        ({"text": ()}, "text_ratio is 0.5, so some steps are text, but data.text lists no source; .* to 0"),
        ({"multimodal": ()}, "some steps are multimodal, but data.multimodal lists no source; .* to 1"),
        ({"text": (), "multimodal": (), "text_ratio": 1}, "data.text lists no source"),
        ({"seq_len": 15}, "one image takes 16 tokens, but data.seq_len is 15"),
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


def test_a_store_of_another_tokenizer_is_refused(corpus, model, train, tmp_path):
    path = write_jsonl(tmp_path / "in.jsonl", [{"text": "a b c"}])
    other = tmp_path / "other.model"
    sentencepiece.SentencePieceTrainer.train(
        input=path, model_prefix=str(tmp_path / "other"), vocab_size=50, hard_vocab_limit=False, minloglevel=2
    )
    build([path], str(tmp_path / "p"), str(other), 1, False, lambda _: None)
    with pytest.raises(DataError, match="was made with another tokenizer"):
        Sampler(corpus.data(text=(SourceConfig(prefix=str(tmp_path / "p")),)), model, train)


def test_a_vocabulary_that_the_model_lacks_is_refused(corpus, model, train):
    small = model.model_copy(update={"decoder": model.decoder.model_copy(update={"vocab_size": 64})})
    with pytest.raises(DataError, match="tokens, but model.decoder.vocab_size is 64"):
        Sampler(corpus.data(), small, train)


def test_a_step_without_a_target_is_refused(corpus, model, train, tmp_path):
    tokenizer = load_tokenizer(corpus.tokenizer)
    with StoreWriter(str(tmp_path / "p"), tokenizer) as writer:
        writer.add(EncodedDocument("only the end", "file", (encoded_text(tokenizer.eos),)))
    data = corpus.data(text=(SourceConfig(prefix=str(tmp_path / "p")),), multimodal=(), text_ratio=1)
    with pytest.raises(DataError, match="step 3 \\(text\\): none of its .* holds a text token to predict"):
        Sampler(data, model, train).plan(3)


def test_sources_are_blended_by_weight(corpus, model):
    sources = (
        SourceConfig(prefix=corpus.prefix("text"), weight=1),
        SourceConfig(prefix=corpus.prefix("more"), weight=4),
    )
    data = corpus.data(text=sources, multimodal=(), text_ratio=1)
    sampler = Sampler(data, model, TrainConfig(steps=20, global_batch=48))
    pieces = [piece for step in range(20) for pack in sampler.plan(step).packs for piece in pack if piece.start == 0]
    share = np.mean([piece.source for piece in pieces])
    assert abs(share - 0.8) < 0.01  # measured 0.800
