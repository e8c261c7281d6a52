"""Documents as they are shown."""

import re
import shutil

import pytest

from megavl.data.errors import DataError
from megavl.data.inspect import sample
from megavl.data.inspect.sample import choose, find, read
from megavl.data.inspect.shown import ImagePart, Role, TextPart
from megavl.data.store import Store
from tests.data.inspect.conftest import ANSWER, DIALOGUE, HOSTILE


def shown(gallery, document, most_tokens=1000):
    return read(gallery.store, document, gallery.tokenizer, most_tokens)


def test_a_dialogue(gallery):
    found = shown(gallery, 1)
    prompt, image, answer = found.parts
    assert (found.key, found.source, found.left_tokens) == ("beetle", "dialogues.jsonl", 0)
    assert "".join(prompt.pieces) == DIALOGUE and set(prompt.roles) == {Role.PROMPT}
    assert (image.width, image.height, image.form) == (60, 30, "PNG")
    assert image.size_bytes == len(gallery.store.image(image.sequence))
    assert "".join(answer.pieces) == ANSWER and set(answer.roles) == {Role.TARGET}
    assert answer.ids[-1] == gallery.tokenizer.eos
    assert found.tokens == len(prompt.ids) + len(answer.ids)


def test_the_first_token_of_a_document_is_never_a_target(gallery):
    (text,) = shown(gallery, 0).parts
    assert text.roles[0] is Role.NEVER and set(text.roles[1:]) == {Role.TARGET}
    assert "".join(text.pieces) == HOSTILE
    forms = [part.form for part in shown(gallery, 2).parts if isinstance(part, ImagePart)]
    assert forms == ["JPEG", "PNG", "unknown"]


@pytest.mark.parametrize("most", [1, 299, 300, 301])
def test_a_long_document_is_shown_as_far_as_asked(gallery, most):
    found = shown(gallery, 3, most)
    assert sum(len(part.ids) for part in found.parts) == min(most, 300)
    assert (found.tokens, found.left_tokens) == (300, max(0, 300 - most))


def test_without_a_tokenizer_ids_are_shown(gallery):
    (text,) = read(gallery.store, 3, None, 5).parts
    assert text.pieces == tuple(f"{id} " for id in text.ids) and isinstance(text, TextPart)


@pytest.mark.parametrize("block", [1, 2, 100])
def test_all_documents_with_a_key(gallery, block, monkeypatch):
    monkeypatch.setattr(sample, "_BLOCK", block)
    assert find(gallery.store, "beetle") == [1, 4] and find(gallery.store, "beet") == []


def test_a_choice_depends_on_the_seed_alone(corpus):
    store = Store(corpus.prefix("text"))
    chosen = choose(store, 10, 0)
    assert chosen == choose(store, 10, 0) != choose(store, 10, 1)
    assert chosen == sorted(set(chosen)) and len(chosen) == 10
    assert choose(store, 1000, 0) == list(range(150))


def test_a_document_that_is_not_there(gallery):
    for document in (-1, 5):
        with pytest.raises(DataError, match=f"no document {document}; it has the documents 0 to 4"):
            shown(gallery, document)


def test_a_token_outside_the_vocabulary_is_an_error(gallery, tmp_path):
    for suffix in ("bin", "idx", "meta"):
        shutil.copy(f"{gallery.store.prefix}.{suffix}", tmp_path)
    with open(tmp_path / "gallery.bin", "r+b") as file:
        file.write(b"\xff\xff\xff\x7f")
    prefix = re.escape(str(tmp_path / "gallery"))
    with pytest.raises(DataError, match=rf"tokens are \d+ to 2147483647, .*verify_data.py {prefix}"):
        read(Store(str(tmp_path / "gallery")), 0, gallery.tokenizer, 100)
