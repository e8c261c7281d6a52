import numpy as np
import pytest

from megavl.data.document import Document, Image, Text, Token
from megavl.data.encode import encode
from megavl.data.encoded import EncodedImage
from megavl.data.errors import DataError
from megavl.data.tokenizer import Tokenizer, load_tokenizer
from tests.data import tokenizer_files
from tests.data.conftest import image_bytes

PICTURE = Image(image_bytes(0, (6, 4)), "a.png")
STORED = EncodedImage(PICTURE.data, 6, 4)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    tokenizer = load_tokenizer(str(tokenizer_files.write_sentencepiece(tmp_path_factory.mktemp("encode") / "t.model")))
    tokenizer.accelerate()
    return tokenizer


def shown(document):
    """Images as they are, learned text as its ids, text that is only read as ("read", ids)."""
    return [
        one
        if isinstance(one, EncodedImage)
        else one.tokens.tolist()
        if one.supervised
        else ("read", one.tokens.tolist())
        for one in document.sequences
    ]


def one(tokenizer, *segments):
    (document,) = encode([Document("key", "file", segments)], tokenizer)
    return shown(document)


def test_every_document_ends_with_end_of_sequence(tokenizer):
    ids, eos = tokenizer.encode, tokenizer.eos
    assert one(tokenizer, Text("abc")) == [[*ids("abc"), eos]]
    assert one(tokenizer, Text("abc "), Text("def")) == [[*ids("abc def"), eos]]
    assert one(tokenizer, Text("abc"), PICTURE, Text("d")) == [ids("abc"), STORED, [*ids("d"), eos]]
    assert one(tokenizer, PICTURE, PICTURE) == [STORED, STORED, [eos]]


def test_it_ends_with_that_token_once(tokenizer):
    ids, eos = tokenizer.encode, tokenizer.eos
    for end in (Token(), Token("</s>")):
        assert one(tokenizer, Text("abc"), end) == [[*ids("abc"), eos]]
        # One in the middle is one more: each answer of a conversation has its own.
        assert one(tokenizer, Text("abc"), end, Text("d")) == [[*ids("abc"), eos, *ids("d"), eos]]
    # Spelled out it is text.
    assert one(tokenizer, Text("abc</s>")) == [[*ids("abc</s>"), eos]]


def test_what_is_only_read_is_a_sequence_of_its_own(tokenizer):
    ids, eos = tokenizer.encode, tokenizer.eos
    question = (Text("User: ", supervised=False), PICTURE, Text("what?\n\n", supervised=False))
    assert one(tokenizer, *question, Text("A"), Text(" cat.")) == [
        ("read", ids("User: ")),
        STORED,
        ("read", ids("what?\n\n")),
        [*ids("A cat."), eos],
    ]
    # The end of what is not learned is not learned.
    assert one(tokenizer, Text("a"), Text("b", supervised=False)) == [ids("a"), ("read", [*ids("b"), eos])]


def test_special_tokens_join_the_text_around_them(tokenizer):
    ids, token = tokenizer.encode, tokenizer.token
    segments = (
        Token("<|ref|>"),
        Text("a"),
        Text(" cat"),
        Token("<|/ref|>"),
        Token("<|User|>", supervised=False),
        Text("<|ref|>"),
    )
    assert one(tokenizer, *segments) == [
        [token("<|ref|>"), *ids("a cat"), token("<|/ref|>")],
        ("read", [token("<|User|>")]),
        [*ids("<|ref|>"), tokenizer.eos],
    ]
    assert token("<|ref|>") not in ids("<|ref|>")


def test_text_that_the_tokenizer_drops_leaves_no_sequence(corpus):
    tokenizer = load_tokenizer(corpus.tokenizer)
    assert tokenizer.encode("\u200b") == []
    assert one(tokenizer, Text("\u200b"), PICTURE) == [STORED, [tokenizer.eos]]
    assert one(tokenizer, Text("\u200b")) == [[tokenizer.eos]]


def test_a_chunk_is_one_call_and_its_bad_documents_disturb_no_other(tokenizer, monkeypatch):
    calls = []
    encode_batch = Tokenizer.encode_batch
    monkeypatch.setattr(Tokenizer, "encode_batch", lambda self, texts: calls.append(texts) or encode_batch(self, texts))
    documents = [
        Document("a", "file.jsonl", (Text("one "), Text("text"), PICTURE, Text("two"))),
        Document("b", "file.jsonl", (Text("abc"), Image(PICTURE.data[:60], "b.png"))),
        Document("c", "file.jsonl", (Text("abc"), Token("<|box|>"))),
        Document("d", "file.jsonl", (Text("three"),)),
    ]
    first, *broken, last = encode(documents, tokenizer)
    assert calls == [["one text", "two", "three"]]
    assert [str(error).split("60 bytes")[0] for error in broken if isinstance(error, DataError)][0] == (
        "file.jsonl: document b: image b.png: "
    )
    assert str(broken[1]).startswith("file.jsonl: document c: tokenizer ") and "'<|box|>'" in str(broken[1])
    assert (first.key, first.source, last.key) == ("a", "file.jsonl", "d")
    assert shown(first) == shown(encode(documents[:1], tokenizer)[0])
    assert shown(last) == [[*tokenizer.encode("three"), tokenizer.eos]]
    assert first.sequences[0].tokens.dtype == np.int32
    assert encode([], tokenizer) == []
