"""What each token stands for."""

import pytest

from megavl.data.inspect.pieces import pieces
from tests.data.inspect.conftest import ANSWER, HOSTILE


@pytest.mark.parametrize("text", [ANSWER, HOSTILE, "\ufffd\ufffd a", "  two  blanks ", "é", "🪲🪲"])
def test_pieces_are_the_text(gallery, text):
    tokens = gallery.tokenizer.encode(text)
    found = pieces(tokens, gallery.tokenizer)
    assert len(found) == len(tokens) and "".join(found) == text


def test_a_character_belongs_to_the_last_of_its_tokens(gallery):
    tokens = gallery.tokenizer.encode("虱!")
    assert pieces(tokens, gallery.tokenizer) == ["", "", "虱", "!"]


def test_a_character_that_is_cut_off_is_shown_as_such(gallery):
    tokens = gallery.tokenizer.encode("a虱")[:-1]
    assert pieces(tokens, gallery.tokenizer) == ["a", "", "\ufffd\ufffd"]
    assert pieces([*tokens, gallery.tokenizer.eos], gallery.tokenizer) == ["a", "", "\ufffd\ufffd", ""]


def test_a_special_token_is_empty_and_spelled_out_it_is_text(gallery):
    tokenizer = gallery.tokenizer
    tokens = [*tokenizer.encode("a</s>b"), tokenizer.eos, *tokenizer.encode(" b")]
    found = pieces(tokens, tokenizer)
    assert "".join(found) == "a</s>b b" and found[tokens.index(tokenizer.eos)] == ""
