import hashlib
from pathlib import Path

import pytest
import sentencepiece
import tokenizers

from megavl.data.errors import DataError
from megavl.data.tokenizer import load_tokenizer


def write_json(path, special, plain=()):
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    model.add_tokens(list(plain))
    model.add_special_tokens(list(special))
    model.save(str(path))
    return str(path)


def test_sentencepiece_ids_are_the_librarys_with_nothing_added(corpus):
    tokenizer = load_tokenizer(corpus.tokenizer)
    reference = sentencepiece.SentencePieceProcessor(model_file=corpus.tokenizer)
    ids = tokenizer.encode("abc def\nghi")
    assert ids == reference.encode("abc def\nghi") and tokenizer.decode(ids) == reference.decode(ids)
    assert (tokenizer.eos, tokenizer.vocab_size) == (reference.eos_id(), len(reference))
    assert tokenizer.identity == hashlib.sha256(Path(corpus.tokenizer).read_bytes()).hexdigest()


def test_json_ids_and_the_first_known_end_of_sequence_token(tmp_path):
    tokenizer = load_tokenizer(write_json(tmp_path / "tokenizer.json", ["</s>", "<｜end▁of▁sentence｜>", "<pad>"]))
    assert tokenizer.encode("a b a") == [0, 1, 0] and tokenizer.decode([0, 1]) == "a b"
    assert (tokenizer.eos, tokenizer.vocab_size) == (4, 6)


def test_a_special_token_spelled_out_in_a_document_stays_text(tmp_path):
    tokenizer = load_tokenizer(write_json(tmp_path / "tokenizer.json", ["</s>"]))
    assert tokenizer.eos not in tokenizer.encode("a </s> b")


def test_what_is_no_usable_tokenizer_is_refused(tmp_path, corpus):
    with pytest.raises(DataError, match="no such file"):
        load_tokenizer(str(tmp_path / "absent.model"))
    (tmp_path / "tokenizer.txt").write_text("x")
    with pytest.raises(DataError, match="'.txt' is neither"):
        load_tokenizer(str(tmp_path / "tokenizer.txt"))
    for name, kind in (("damaged.model", "sentencepiece model"), ("damaged.json", "tokenizer.json")):
        (tmp_path / name).write_text("{")
        with pytest.raises(DataError, match=f"{name} is not a {kind}"):
            load_tokenizer(str(tmp_path / name))
    with pytest.raises(DataError, match="no end-of-sequence token: none of .* is among its special tokens \\(<pad>\\)"):
        load_tokenizer(write_json(tmp_path / "tokenizer.json", ["<pad>"], plain=["</s>"]))
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus.root / "text.jsonl"),
        model_prefix=str(tmp_path / "no_eos"),
        vocab_size=300,
        hard_vocab_limit=False,
        eos_id=-1,
        minloglevel=2,
    )
    with pytest.raises(DataError, match="no end-of-sequence token"):
        load_tokenizer(str(tmp_path / "no_eos.model"))
