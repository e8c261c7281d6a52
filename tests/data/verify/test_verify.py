"""Verification: a sound dataset passes, and each kind of damage is found, named and counted."""

import dataclasses
import shutil
import tracemalloc

import numpy as np
import pyarrow as pa
import pytest

from megavl.data import checksum
from megavl.data.encoded import EncodedDocument, EncodedImage
from megavl.data.format import IMAGE, TEXT
from megavl.data.store import Store
from megavl.data.tokenizer import load_tokenizer
from megavl.data.verify import found, keys, tokens, verify
from megavl.data.writer import StoreWriter
from tests.data.conftest import encoded_text, image_bytes

CHECKS = {"checksums", "index", "keys", "tokenizer", "tokens", "images"}


def check(store, tokenizer=None, images="all", workers=1):
    """Check -> (count, messages); what was reported is as much as was announced."""
    reported = []
    result = verify.verify(store, tokenizer, images, workers, reported.append)
    if not result["index"].count and images == "all":
        assert sum(reported) == pytest.approx(verify.work_bytes(store), abs=len(reported))
    return {name: (one.count, one.messages) for name, one in result.items()}


def wrong(result) -> set[str]:
    return {name for name, (count, _) in result.items() if count}


@pytest.fixture
def copy(corpus, tmp_path):
    """The multimodal dataset, to be damaged: a function that overwrites a part of a file and opens the dataset."""
    for suffix in ("bin", "idx", "meta"):
        shutil.copy(corpus.prefix("multimodal") + f".{suffix}", tmp_path / f"p.{suffix}")

    def overwrite(suffix: str, offset: int, data: bytes) -> Store:
        with open(tmp_path / f"p.{suffix}", "r+b") as file:
            file.seek(offset)
            file.write(data)
        return Store(str(tmp_path / "p"))

    return overwrite


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("name", ["text", "multimodal"])
def test_a_sound_dataset_passes(corpus, name, workers, monkeypatch):
    monkeypatch.setattr(verify, "_ENTRIES", 7)
    monkeypatch.setattr(verify, "_BYTES", 1000)
    result = check(Store(corpus.prefix(name)), corpus.tokenizer, workers=workers)
    assert set(result) == CHECKS and wrong(result) == set()


def test_every_block_is_looked_at_once(corpus, monkeypatch):
    monkeypatch.setattr(verify, "_DOCUMENTS", 13)
    for size in (1, 500, 10**9):
        monkeypatch.setattr(verify, "_BYTES", size)
        blocks = list(verify._blocks(Store(corpus.prefix("multimodal"))))
        assert [document for first, stop in blocks for document in range(first, stop)] == list(range(60))


def test_a_token_outside_the_vocabulary(copy, monkeypatch):
    monkeypatch.setattr(tokens, "_TOKENS", 3)
    store = copy("bin", 0, b"")
    places = np.flatnonzero(store.modes == TEXT)[[0, 5]].tolist()
    for sequence in places:
        # Two of a sequence, further apart than what is read at a time, are one finding.
        for token in (0, int(store.lengths[sequence]) - 1):
            store = copy("bin", int(store.pointers[sequence]) + 4 * token, (5000 + token).to_bytes(4, "little"))
    result = check(store)
    assert wrong(result) == {"checksums", "tokens"}
    count, messages = result["tokens"]
    assert count == 2
    for sequence, message in zip(places, messages, strict=True):
        assert f"its sequence {sequence} holds the ids 5000 to" in message
        assert f"the vocabulary is 0 to {store.meta.vocab_size - 1}" in message


def test_an_image_that_does_not_decode(copy):
    store = copy("bin", 0, b"")
    images = np.flatnonzero(store.modes == IMAGE).tolist()
    store = copy("bin", int(store.pointers[images[0]]) + 8, b"\0" * 40)
    store = copy("bin", int(store.pointers[images[1]]), b"\x09\0\0\0")
    result = check(store)
    count, (first, second) = result["images"]
    assert wrong(result) == {"checksums", "images"} and count == 2
    assert f"the image in its sequence {images[0]}: " in first and "cannot be decoded" in first
    assert f"sequence {images[1]} starts with 9, not a number of pad bytes" in second
    assert wrong(check(store, images="none")) == {"checksums"}


def test_a_sample_of_the_images_is_those_of_some_documents(copy):
    store = copy("bin", 0, b"")
    images = np.flatnonzero(store.modes == IMAGE).tolist()
    for sequence in images:
        store = copy("bin", int(store.pointers[sequence]) + 4, b"\0" * 20)
    documents = np.searchsorted(store.documents, images, side="right") - 1
    assert check(store, images="sample")["images"][0] == int((documents % 16 == 0).sum()) > 0
    assert check(store, images="all")["images"][0] == len(images)


def column(store, name) -> int:
    """Where a column of the index begins."""
    sizes = {"lengths": 4 * len(store.lengths), "pointers": 8 * len(store.lengths), "documents": 8 * (len(store) + 1)}
    offset = 34
    for other, size in sizes.items():
        if other == name:
            return offset
        offset += size
    return offset


@pytest.mark.parametrize(
    ("name", "entry", "value", "messages"),
    [
        ("lengths", 3, b"\0\0\0\0", ["sequence 4 begins at byte", "sequence 3 has 0 elements"]),
        ("pointers", 2, (1).to_bytes(8, "little"), ["sequence 2 begins at byte 1, not at", "sequence 3 begins"]),
        ("documents", 4, (10**6).to_bytes(8, "little"), ["document 3 is the sequences", "document 4 is the sequences"]),
        ("documents", 4, (0).to_bytes(8, "little"), ["document 3 is the sequences"]),
        ("modes", 0, b"\x07", ["sequence 0 has the mode 7, not 0, 1 or 2"]),
    ],
)
def test_an_entry_of_the_index_that_is_not_possible(copy, name, entry, value, messages, monkeypatch):
    monkeypatch.setattr(verify, "_ENTRIES", 5)
    store = copy("idx", 0, b"")
    result = check(copy("idx", column(store, name) + entry * len(value), value))
    assert wrong(result) == {"checksums", "index"}, "tokens and images are not looked for where they may not be"
    count, found_messages = result["index"]
    assert count == len(messages)
    for expected in messages:
        assert any(message.startswith(expected) for message in found_messages), found_messages


def test_another_tokenizer(corpus, tmp_path):
    store = Store(corpus.prefix("text"))
    (count, (message,)) = check(store, str(tmp_path / "absent.model"))["tokenizer"]
    assert count == 1 and "no such file" in message
    store.meta = dataclasses.replace(store.meta, tokenizer="0" * 64)
    (count, (message,)) = check(store, corpus.tokenizer)["tokenizer"]
    assert count == 1 and f"sha256 {'0' * 16}..., vocabulary 300) than {corpus.tokenizer} (sha256" in message


def test_rows_and_images_that_do_not_agree(tmp_path, corpus):
    tokenizer = load_tokenizer(corpus.tokenizer)
    data = image_bytes(0, (20, 10))
    text = encoded_text(1, tokenizer.eos)
    with StoreWriter(str(tmp_path / "p"), tokenizer) as writer:
        writer.add(
            EncodedDocument("right", "f", (EncodedImage(data, 20, 10), text)),
            EncodedDocument("wrong", "f", (EncodedImage(data, 10, 20), text)),
        )
    result = check(Store(str(tmp_path / "p")), corpus.tokenizer)
    assert wrong(result) == {"images"}
    size = len(data)
    assert result["images"] == (
        1,
        [
            "document 'wrong' (number 1): the image in its sequence 2: "
            f"10 x 20 pixels in {size} bytes are listed, but it has 20 x 10 in {size}"
        ],
    )


def test_rows_that_list_other_images(copy, monkeypatch):
    """Rows have checksums of their own, so this is what a faulty writer would do."""
    store = copy("bin", 0, b"")
    document = int(np.searchsorted(store.documents, np.flatnonzero(store.modes == IMAGE)[0], side="right")) - 1

    def rows(first, stop, original=store.rows):
        table = original(first, stop)
        images = table["images"].to_pylist()
        if first <= document < stop:
            images[document - first] = []
        for row in images[document - first + 1 :]:
            for image in row:
                image["bytes"] += 4
        return table.set_column(2, "images", pa.array(images, table["images"].type))

    monkeypatch.setattr(store, "rows", rows)
    _, messages = check(store, images="none")["images"]
    assert f"(number {document}): 0 images are listed, but it holds" in messages[0]
    assert "bytes, which take" in messages[1]


@pytest.mark.parametrize(("partition", "block"), [(1 << 22, 1 << 16), (10, 7)])
def test_repeated_keys_are_counted(tmp_path, corpus, monkeypatch, partition, block):
    monkeypatch.setattr(keys, "_PARTITION", partition)
    monkeypatch.setattr(keys, "_BLOCK", block)
    monkeypatch.setattr(keys, "_RECORDS", 3)
    names = ["a", "b", *map(str, range(40)), "a", "ü", "b", "a", "ü"]
    with StoreWriter(str(tmp_path / "p"), load_tokenizer(corpus.tokenizer)) as writer:
        writer.add(*(EncodedDocument(name, "f", (encoded_text(1, 2),)) for name in names))
    count, messages = check(Store(str(tmp_path / "p")))["keys"]
    assert count == 3
    assert sorted(messages) == [
        "the key 'a' of document 0 is that of 3 documents",
        "the key 'b' of document 1 is that of 2 documents",
        "the key 'ü' of document 43 is that of 2 documents",
    ]


def test_more_than_can_be_listed_is_counted(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(verify, "_DOCUMENTS", 9)
    for suffix in ("bin", "idx", "meta"):
        shutil.copy(corpus.prefix("text") + f".{suffix}", tmp_path / f"p.{suffix}")
    size = (tmp_path / "p.bin").stat().st_size
    (tmp_path / "p.bin").write_bytes(b"\xff" * size)
    results = [check(Store(str(tmp_path / "p")), workers=workers) for workers in (1, 2)]
    count, messages = results[0]["tokens"]
    assert count == 150 and len(messages) == found.LIMIT
    assert [int(message.partition("(number ")[2].partition(")")[0]) for message in messages] == list(range(20))
    assert results[0] == results[1]


def test_a_file_that_is_cut_off_meanwhile(copy, tmp_path):
    store = copy("bin", 0, b"")
    with open(tmp_path / "p.bin", "r+b") as file:
        file.truncate(1000)
    result = check(store, images="none")
    assert {"checksums", "tokens"} <= wrong(result)
    assert "p.bin ends before byte" in result["tokens"][1][0]


def test_memory_does_not_grow_with_the_dataset(tmp_path, corpus, monkeypatch):
    for module, name, value in (
        (checksum, "_BLOCK_BYTES", 1024),
        (verify, "_DOCUMENTS", 256),
        (verify, "_ENTRIES", 256),
        (tokens, "_TOKENS", 1024),
        (keys, "_PARTITION", 2000),
        (keys, "_BLOCK", 256),
        (keys, "_RECORDS", 64),
    ):
        monkeypatch.setattr(module, name, value)
    peaks = []
    for size in (2000, 20000):
        with StoreWriter(str(tmp_path / str(size)), load_tokenizer(corpus.tokenizer)) as writer:
            writer.add(*(EncodedDocument(f"key {index}", "f", (encoded_text(1, 2, 3),)) for index in range(size)))
        store = Store(str(tmp_path / str(size)))
        check(store)  # what is imported and opened at first use
        tracemalloc.start()
        assert wrong(check(store)) == set()
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    # Measured: 1.4 times, for nine more files of keys with their buffers, where the dataset has 10 times the documents.
    assert peaks[1] < 2 * peaks[0], peaks
