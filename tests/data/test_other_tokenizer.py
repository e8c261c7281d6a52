"""A dataset of another tokenizer: sampling, merging and verifying tell it alike and say the same."""

import pytest

from megavl.config.run import SourceConfig
from megavl.data.encoded import EncodedDocument
from megavl.data.errors import DataError
from megavl.data.merge import merge
from megavl.data.sampler import Sampler
from megavl.data.store import Store
from megavl.data.tokenizer import load_tokenizer
from megavl.data.verify.found import Found
from megavl.data.verify.tokenizer import check_tokenizer
from megavl.data.writer import StoreWriter
from tests.data.conftest import encoded_text


@pytest.fixture
def store(corpus, tmp_path, request):
    """A dataset whose tokenizer differs in one attribute from the corpus's."""
    tokenizer = load_tokenizer(corpus.tokenizer)
    for name, value in request.param.items():
        setattr(tokenizer, name, value)
    with StoreWriter(str(tmp_path / "p"), tokenizer) as writer:
        writer.add(EncodedDocument("key", "file", (encoded_text(1, 2),)))
    return Store(str(tmp_path / "p"))


def said_by_the_sampler(store, corpus, model, train):
    try:
        Sampler(corpus.data(text=(SourceConfig(prefix=store.prefix),)), model, train)
    except DataError as error:
        return str(error)


def said_by_the_merge(store, corpus, tmp_path):
    try:
        merge([corpus.prefix("text"), store.prefix], str(tmp_path / "merged"))
    except DataError as error:
        return str(error)


def said_by_the_verification(store, corpus):
    found = Found()
    check_tokenizer(store, corpus.tokenizer, found)
    return found.messages[0] if found.messages else None


@pytest.mark.parametrize(
    ("store", "made"),
    [
        ({}, None),
        ({"identity": "0" * 64}, "was made with another tokenizer (sha256 0000000000000000..., vocabulary 300) than "),
        ({"vocab_size": 301}, "was made with another tokenizer (sha256 {identity}..., vocabulary 301) than "),
    ],
    indirect=["store"],
)
def test_a_dataset_of_another_tokenizer(store, made, corpus, model, train, tmp_path):
    identity = load_tokenizer(corpus.tokenizer).identity[:16]
    said = (
        said_by_the_sampler(store, corpus, model, train),
        said_by_the_merge(store, corpus, tmp_path),
        said_by_the_verification(store, corpus),
    )
    if made is None:
        assert said == (None, None, None)
        return
    for message, other in zip(said, ("data.tokenizer", corpus.prefix("text"), corpus.tokenizer), strict=True):
        assert made.format(identity=identity) + other in message
        assert f"(sha256 {identity}..., vocabulary 300)" in message
