from collections import Counter

import pytest

from megavl.data import stream as stream_module
from megavl.data.format import IMAGE
from megavl.data.store import Store
from megavl.data.stream import Stream

SEQ_LEN, IMAGE_TOKENS = 96, 16


@pytest.fixture
def stream(corpus, monkeypatch):
    """Makes streams whose windows are so small that a few packs cross several."""
    monkeypatch.setattr(stream_module, "_WINDOW", 50)

    def make(*names, weights=None, seed=0, seq_len=SEQ_LEN):
        stores = tuple(Store(corpus.prefix(name)) for name in names)
        return Stream(stores, weights or (1.0,) * len(names), seq_len, IMAGE_TOKENS, (seed, 0))

    return make


def window(stream, number):
    """The pieces of one window, in the order of the packs."""
    stream.pack(10 * (number + 1) * 50)  # far behind it
    return [piece for pack in range(*stream._first[number : number + 2]) for piece in stream.pack(pack)]


@pytest.mark.parametrize(("name", "size"), [("text", 150), ("multimodal", 60)])
def test_every_document_is_drawn_whole_and_once_per_epoch(corpus, stream, name, size):
    store = Store(corpus.prefix(name))
    one = stream(name)
    epochs, windows = 2, 2 * size // 50 if size == 150 else 6  # 300 draws in both cases
    drawn = [piece for number in range(windows) for piece in window(one, number)]
    repeats = epochs if size == 150 else 5
    seen = Counter((piece.document, piece.start, piece.stop) for piece in drawn)
    assert set(seen.values()) == {repeats}
    assert {document for document, _, _ in seen} == set(range(size))
    for document in range(size):
        first, last = store.documents[document : document + 2]
        length = sum(
            IMAGE_TOKENS if store.modes[index] == IMAGE else int(store.lengths[index]) for index in range(first, last)
        )
        parts = sorted((start, stop) for other, start, stop in seen if other == document)
        assert [start for start, _ in parts] == [0, *(stop for _, stop in parts[:-1])]
        assert parts[-1][1] == length


def test_epochs_and_seeds_differ_in_order(stream):
    one = stream("text")
    epochs = [[piece.document for number in range(3 * e, 3 * e + 3) for piece in window(one, number)] for e in (0, 1)]
    other = [piece.document for number in range(3) for piece in window(stream("text", seed=1), number)]
    assert epochs[0] != epochs[1] and epochs[0] != other and epochs[0] != sorted(epochs[0])


def test_packs_stay_within_the_budget_and_leave_little_room(stream):
    one = stream("text")
    sizes = [sum(piece.tokens for piece in one.pack(number)) for number in range(200)]
    assert max(sizes) <= SEQ_LEN
    assert sum(sizes) / (SEQ_LEN * len(sizes)) > 0.85  # measured 0.883: tiny windows, documents up to the budget


def test_a_pack_does_not_depend_on_what_was_asked_before(stream):
    ascending, jumping = stream("text", "more", weights=(3.0, 1.0)), stream("text", "more", weights=(3.0, 1.0))
    expected = [ascending.pack(number) for number in range(120)]
    assert [jumping.pack(number) for number in (119, 0, 60, 5, 119)] == [expected[n] for n in (119, 0, 60, 5, 119)]


def test_sources_are_drawn_by_weight(stream):
    one = stream("text", "more", weights=(3.0, 1.0))
    documents = [piece for number in range(8) for piece in window(one, number) if piece.start == 0]
    counts = Counter(piece.source for piece in documents)
    assert counts == {0: 300, 1: 100}


def test_no_pack_splits_an_image(corpus, stream):
    """Packs hardly longer than an image: most documents are cut."""
    store = Store(corpus.prefix("multimodal"))
    one = stream("multimodal", seq_len=IMAGE_TOKENS + 5)
    drawn = [piece for number in range(6) for piece in window(one, number)]
    assert sum(piece.start > 0 for piece in drawn) > len(drawn) // 2
    images = 0
    for piece in drawn:
        offset = 0
        for index in range(*store.documents[piece.document : piece.document + 2]):
            is_image = store.modes[index] == IMAGE
            stop = offset + (IMAGE_TOKENS if is_image else int(store.lengths[index]))
            if is_image:
                images += piece.start <= offset and stop <= piece.stop
                assert stop <= piece.start or piece.stop <= offset or (piece.start <= offset and stop <= piece.stop)
            offset = stop
    assert images == sum(piece.images for piece in drawn) == 5 * int((store.modes == IMAGE).sum())
