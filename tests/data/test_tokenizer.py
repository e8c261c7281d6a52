import hashlib
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megavl.data import fast_tokenizer
from megavl.data.errors import DataError
from megavl.data.fast_tokenizer import FastTokenizer
from megavl.data.tokenizer import load_tokenizer
from tests.data import tokenizer_files
from tests.data.tokenizer_files import MARKERS, ORDINARY, SPECIAL, WORD

KINDS = {
    "sentencepiece": lambda path: tokenizer_files.write_sentencepiece(path.with_suffix(".model")),
    "llama": lambda path: tokenizer_files.write_sentencepiece(path.with_suffix(".model"), add_dummy_prefix=True),
    "deepseek": tokenizer_files.write_deepseek,
    "gpt2": tokenizer_files.write_gpt2,
}
FRAGMENTS = [
    *SPECIAL,
    *MARKERS,
    *ORDINARY,
    " ",
    "\n",
    "\r\n",
    "\t",
    "\xa0",
    "1",
    "23",
    "a",
    "B",
    "'s",
    "é",
    "你",
    "の",
    "▁",
    "😀",
]


def write_words(path, special, plain=()):
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    model.add_tokens(list(plain))
    model.add_special_tokens(list(special))
    model.save(str(path))
    return str(path)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    root = tmp_path_factory.mktemp("tokenizers")
    return {kind: str(write(root / f"{kind}.json")) for kind, write in KINDS.items()}


@pytest.fixture(params=KINDS)
def path(files, request):
    return files[request.param]


@pytest.fixture
def fast(path):
    tokenizer = load_tokenizer(path)
    tokenizer.accelerate()
    assert tokenizer.backend.startswith("gigatoken"), tokenizer.backend
    return tokenizer


def test_sentencepiece_ids_are_the_librarys_with_nothing_added(corpus):
    tokenizer = load_tokenizer(corpus.tokenizer)
    reference = sentencepiece.SentencePieceProcessor(model_file=corpus.tokenizer)
    ids = tokenizer.encode("abc def\nghi")
    assert ids == reference.encode("abc def\nghi") and tokenizer.decode(ids) == reference.decode(ids)
    assert (tokenizer.eos, tokenizer.vocab_size) == (reference.eos_id(), len(reference))
    assert tokenizer.identity == hashlib.sha256(Path(corpus.tokenizer).read_bytes()).hexdigest()


def test_json_ids_and_the_first_known_end_of_sequence_token(tmp_path):
    tokenizer = load_tokenizer(write_words(tmp_path / "tokenizer.json", ["</s>", "<｜end▁of▁sentence｜>", "<pad>"]))
    assert tokenizer.encode("a b a") == [0, 1, 0] and tokenizer.decode([0, 1]) == "a b"
    assert (tokenizer.eos, tokenizer.vocab_size) == (4, 6)


def test_a_batch_is_arrays_of_the_ids(path, fast):
    texts = ["", "two words", "你好，世界！", ""]
    for tokenizer in (load_tokenizer(path), fast):
        batch = tokenizer.encode_batch(texts)
        assert [tokens.dtype for tokens in batch] == [np.int32] * 4
        assert [tokens.tolist() for tokens in batch] == [tokenizer.encode(text) for text in texts]
        assert tokenizer.encode_batch([]) == []


def test_special_tokens_have_ids_and_their_spelling_is_text(path, fast):
    reference = tokenizers.Tokenizer.from_file(path) if path.endswith(".json") else None
    for name in [*SPECIAL[3:], *MARKERS]:
        id = fast.token(name)
        assert reference is None or id == reference.token_to_id(name)
        text = f"see {name}{name} or {name}"
        assert fast.decode(fast.encode(text)) == text
        for tokens in (fast.encode(text), *(ids.tolist() for ids in fast.encode_batch([text, name]))):
            assert id not in tokens and fast.eos not in tokens
    with pytest.raises(DataError, match=r"has no special token '<\|box\|>' \(it has <.*; add it to the tokenizer"):
        fast.token("<|box|>")


def test_an_added_token_is_special_where_it_is_declared_or_spelled_so(files):
    tokenizer = load_tokenizer(files["deepseek"])
    assert tokenizer.token("<｜User｜>") not in tokenizer.encode("<｜User｜>")
    with pytest.raises(DataError, match="no special token 'ü'"):
        tokenizer.token("ü")
    added = tokenizers.Tokenizer.from_file(files["deepseek"]).token_to_id("ü")
    assert added in tokenizer.encode("über")
    pieces = sentencepiece.SentencePieceProcessor(model_file=files["sentencepiece"])
    assert pieces.piece_to_id(WORD) in load_tokenizer(files["sentencepiece"]).encode(f"a {WORD}")


def test_decoding_gives_the_text_back(fast):
    for text in (*tokenizer_files.texts(), "\x00 \u200d\U0010ffff\r\n", "  two  spaces  "):
        assert fast.decode(fast.encode(text)) == text


def test_fast_ids_are_the_librarys_on_a_corpus(fast):
    modules = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[::4]
    sources = [path.read_text(encoding="utf-8") for path in modules]
    lines = [line for source in sources for line in source.splitlines(keepends=True)]
    texts = [*sources[:10], *lines[:3000], *tokenizer_files.texts()]
    assert [tokens.tolist() for tokens in fast.encode_batch(texts)] == [fast.encode(text) for text in texts]


# Characters that Python's Unicode tables do not know are left out: an ideograph of Unicode 17 is a letter to one
# package and none to another that is older.
_KNOWN = st.characters(exclude_categories=["Cs", "Cn"])


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(st.text(_KNOWN) | st.lists(st.sampled_from(FRAGMENTS) | _KNOWN).map("".join), min_size=40))
def test_fast_ids_are_the_librarys_on_any_text(fast, texts):
    assert [tokens.tolist() for tokens in fast.encode_batch(texts)] == [fast.encode(text) for text in texts]


def test_a_fast_path_with_other_ids_is_not_taken(path, monkeypatch):
    right = FastTokenizer.encode_batch

    def wrong(self, texts):
        return [np.where(np.arange(len(ids)) == 3, ids + 1, ids) for ids in right(self, texts)]

    monkeypatch.setattr(FastTokenizer, "encode_batch", wrong)
    tokenizer = load_tokenizer(path)
    tokenizer.accelerate()
    assert "without gigatoken" in tokenizer.backend and "from place 3 on in the place of [" in tokenizer.backend
    assert tokenizer.encode_batch(["one two three four five"])[0].tolist() == tokenizer.encode(
        "one two three four five"
    )


def test_texts_of_the_input_are_checked_too(path, monkeypatch):
    right = FastTokenizer.encode_batch

    def wrong(self, texts):
        return [ids[:-1] if "rare" in text else ids for text, ids in zip(texts, right(self, texts), strict=True)]

    monkeypatch.setattr(FastTokenizer, "encode_batch", wrong)
    tokenizer = load_tokenizer(path)
    tokenizer.accelerate()
    assert tokenizer.checked(["a common word"]) is tokenizer and tokenizer.backend.startswith("gigatoken")
    plain = tokenizer.checked(["a common word", "a rare word"])
    assert "without gigatoken" in plain.backend and "'a rare word'" in plain.backend
    assert plain.encode_batch(["a rare word"])[0].tolist() == tokenizer.encode("a rare word")


def test_a_tokenizer_that_gigatoken_cannot_serve_is_left_to_its_library(tmp_path, corpus):
    llm = load_tokenizer(str(tokenizer_files.write_deepseek_llm(tmp_path / "llm.json")))
    unigram = load_tokenizer(corpus.tokenizer)
    spaces = tokenizer_files.write_sentencepiece(tmp_path / "spaces.model", user_defined_symbols=["▁▁▁▁▁▁"])
    normalised = tokenizer_files.write_sentencepiece(tmp_path / "nfkc.model", normalization_rule_name="nmt_nfkc")
    for tokenizer, reason in (
        (llm, "it cannot serve this tokenizer: Unknown pre_tokenizer Split"),
        (unigram, "it cannot serve this tokenizer: only BPE sentencepiece models"),
        (load_tokenizer(str(spaces)), "' x  x   x    x     x"),
        (load_tokenizer(str(normalised)), "'\\tif (a != b)"),
    ):
        tokenizer.accelerate()
        assert f"without {fast_tokenizer.NAME}: {reason}" in tokenizer.backend
        assert tokenizer.encode_batch(["abc def"])[0].tolist() == tokenizer.encode("abc def")


def test_the_words_that_it_has_met_are_forgotten_in_time(path, monkeypatch):
    monkeypatch.setattr(fast_tokenizer, "_RELOAD_CHARACTERS", 1000)
    library = load_tokenizer(path)._library
    loads = []
    load = library.load_fast
    monkeypatch.setattr(library, "load_fast", lambda: loads.append(1) or load())
    fast = FastTokenizer(library)
    for number in range(7):
        (tokens,) = fast.encode_batch([f"{number}" * 400])
        assert tokens.tolist() == library.encode(f"{number}" * 400)
    assert len(loads) == 3


def test_what_is_no_usable_tokenizer_is_refused(tmp_path, corpus):
    with pytest.raises(DataError, match="no such file"):
        load_tokenizer(str(tmp_path / "absent.model"))
    (tmp_path / "tokenizer.txt").write_text("x")
    with pytest.raises(DataError, match="'.txt' is neither"):
        load_tokenizer(str(tmp_path / "tokenizer.txt"))
    for name, kind in (("damaged.model", "sentencepiece model"), ("damaged.json", "tokenizer.json")):
        for content in (b"{", b"[]", b"null", b'{"added_tokens": 1}', b"\xff\x00", b""):
            (tmp_path / name).write_bytes(content)
            with pytest.raises(DataError, match=f"{name} is not a {kind}"):
                load_tokenizer(str(tmp_path / name))
    with pytest.raises(DataError, match="no end-of-sequence token: none of .* special tokens \\(<pad>\\)"):
        load_tokenizer(write_words(tmp_path / "tokenizer.json", ["<pad>"], plain=["eos"]))
    no_eos = tokenizer_files.write_sentencepiece(tmp_path / "no_eos.model", eos_id=-1)
    with pytest.raises(DataError, match="no end-of-sequence token"):
        load_tokenizer(str(no_eos))
