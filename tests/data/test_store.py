"""The store against megatron-core: the same bytes, opened by its reader, and each of its silent failures refused."""

import json
import os
import pickle
import struct
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

from megavl.data.encoded import EncodedDocument, EncodedImage
from megavl.data.errors import DataError
from megavl.data.format import IMAGE, PROMPT, TEXT
from megavl.data.store import Store
from megavl.data.writer import StoreWriter
from tests.data.conftest import encoded_text
from tests.data.fuzz_store import fuzz, seeds
from tests.data.stores import FILES, Vocabulary, contents, documents, mixed, read, records, write


@pytest.fixture(scope="module")
def megatron():
    """megatron-core's own module, imported as any user does (it warns of packages that only a GPU needs)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core.datasets import indexed_dataset
    return indexed_dataset


def left(directory) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65499, "uint16"), (65500, "int32"), (102400, "int32")])
def test_text_files_are_byte_for_byte_megatrons(tmp_path, megatron, vocab_size, dtype):
    store = write(tmp_path / "ours", documents(vocab_size), vocab_size)
    assert store.dtype == dtype
    builder = megatron.IndexedDatasetBuilder(
        str(tmp_path / "theirs.bin"), dtype=megatron.DType.optimal_dtype(vocab_size), multimodal=False
    )
    for document in documents(vocab_size):
        builder.add_item(torch.from_numpy(document.sequences[0].tokens))
        builder.end_document()
    builder.finalize(str(tmp_path / "theirs.idx"))
    for suffix in ("bin", "idx"):
        assert (tmp_path / f"ours.{suffix}").read_bytes() == (tmp_path / f"theirs.{suffix}").read_bytes()


def test_multimodal_files_are_byte_for_byte_megatrons_and_open_there(tmp_path, megatron):
    store = write(tmp_path / "ours", mixed())
    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.int32, multimodal=True)
    for document in mixed():
        for sequence in document.sequences:
            if isinstance(sequence, EncodedImage):
                pad = -len(sequence.data) % 4
                payload = np.frombuffer(sequence.data + bytes(pad), dtype=np.int32)
                builder.add_item(torch.from_numpy(np.concatenate(([pad], payload)).astype(np.int32)), mode=1)
            else:
                builder.add_item(torch.from_numpy(sequence.tokens), mode=0)
        builder.end_document()
    builder.finalize(str(tmp_path / "theirs.idx"))
    for suffix in ("bin", "idx"):
        assert (tmp_path / f"ours.{suffix}").read_bytes() == (tmp_path / f"theirs.{suffix}").read_bytes()

    stock = megatron.IndexedDataset(str(tmp_path / "ours"), multimodal=True)
    assert stock.document_indices.tolist() == store.documents.tolist()
    for index, sequence in enumerate(sequence for document in mixed() for sequence in document.sequences):
        elements, mode = stock[index]
        assert mode == store.modes[index]
        if isinstance(sequence, EncodedImage):
            assert elements[1:].tobytes()[: len(elements[1:]) * 4 - elements[0]] == sequence.data
        else:
            assert elements.tolist() == sequence.tokens.tolist()


def test_stock_megatron_opens_a_text_store(tmp_path, megatron):
    write(tmp_path / "ours", documents(300))
    stock = megatron.IndexedDataset(str(tmp_path / "ours"))
    assert [stock[index].tolist() for index in range(len(stock))] == [
        one.sequences[0].tokens.tolist() for one in documents(300)
    ]


def test_what_was_written_is_read_back(tmp_path):
    store = pickle.loads(pickle.dumps(write(tmp_path / "p", mixed())))
    assert len(store) == 12
    for number, document in enumerate(mixed()):
        first, stop = store.documents[number : number + 2]
        assert stop - first == len(document.sequences)
        for index, sequence in zip(range(first, stop), document.sequences, strict=True):
            if store.modes[index] == IMAGE:
                assert store.image(index) == sequence.data
            else:
                tokens = sequence.tokens.tolist()
                assert store.text(index, 0, len(tokens)).tolist() == tokens
                assert store.text(index, 1, len(tokens)).tolist() == tokens[1:]
        assert (store.key(number), store.source(number)) == (document.key, "file")
    store.verify()
    assert (store.meta.tokenizer, store.meta.vocab_size, store.meta.multimodal) == ("f" * 64, 300, True)


def test_a_prompt_or_an_image_makes_a_text_dataset_multimodal(tmp_path):
    """What was written before is widened: the files are those of a dataset that was multimodal from the start."""
    text = documents(300)
    prompt = EncodedDocument("prompt", "file", (encoded_text(7, 8, supervised=False), encoded_text(9)))
    assert not write(tmp_path / "text", text).multimodal
    for last in (prompt, mixed()[0]):
        store = write(tmp_path / "late", [*text, last], overwrite=True)
        assert (store.multimodal, store.dtype) == (True, "int32")
        assert [read(store, one) for one in range(40)] == [one.sequences[0].tokens.tolist() for one in text]
        store.verify()
        early = write(tmp_path / "early", [last, *text], overwrite=True)
        assert records(early) == records(store)[-1:] + records(store)[:-1]
    store = write(tmp_path / "late", [*text, prompt], overwrite=True)
    assert store.modes[-3:].tolist() == [TEXT, PROMPT, TEXT]
    assert (store.meta.images, early.meta.images) == (0, 1)


def test_many_documents_at_once_are_the_same_as_one_by_one(tmp_path):
    items = [*documents(300), *mixed(), *documents(300, 5)]
    one_by_one = write(tmp_path / "p", items)
    with StoreWriter(str(tmp_path / "q"), Vocabulary(300)) as writer:
        writer.add(*items)
    assert contents(tmp_path / "p") == contents(tmp_path / "q")
    assert (writer.documents, writer.images) == (len(one_by_one), one_by_one.meta.images)
    assert writer.tokens == one_by_one.lengths[one_by_one.modes != IMAGE].sum()
    images = [one for item in mixed() for one in item.sequences if isinstance(one, EncodedImage)]
    assert writer.image_bytes == sum(len(image.data) for image in images)


def test_the_meta_file_is_arrow_with_a_row_per_document(tmp_path):
    import pyarrow as pa

    write(tmp_path / "p", mixed())
    with pa.ipc.open_file(str(tmp_path / "p.meta")) as file:
        table = file.read_all()
    assert table.column_names == ["key", "source", "images"]
    image = mixed()[0].sequences[1]
    assert table["images"][0].as_py() == [{"width": 9, "height": 5, "bytes": len(image.data)}]


@pytest.mark.parametrize("tokens", [[1, 70000], [-1], [300]])
def test_a_token_outside_the_vocabulary_is_refused_and_nothing_remains(tmp_path, tokens):
    """megatron-core wraps 70000 to 4464 in a uint16 file."""
    with pytest.raises(DataError, match="document odd holds the token ids .*0 to 299"):
        write(tmp_path / "p", [*documents(300), EncodedDocument("odd", "file", (encoded_text(*tokens),))])
    assert left(tmp_path) == []


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([], "no document to write"),
        ([EncodedDocument("k", "f", ())], "document k is empty"),
        ([EncodedDocument("k", "f", (encoded_text(),))], "document k holds an empty text sequence"),
    ],
)
def test_what_cannot_be_stored_is_refused_and_nothing_remains(tmp_path, items, message):
    with pytest.raises(DataError, match=message):
        write(tmp_path / "p", items)
    assert left(tmp_path) == []


def test_an_interrupted_writer_leaves_nothing_and_keeps_what_was_there(tmp_path):
    write(tmp_path / "p", documents(300, 3))
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}

    def interrupted():
        yield from documents(300, 2)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "p", interrupted(), overwrite=True)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_files_of_the_prefix_are_replaced_only_on_request(tmp_path):
    write(tmp_path / "p", documents(300, 3))
    with pytest.raises(DataError, match="exist already; .*--overwrite"):
        write(tmp_path / "p", documents(300, 4))
    assert len(Store(str(tmp_path / "p"))) == 3
    assert len(write(tmp_path / "p", documents(300, 4), overwrite=True)) == 4
    assert left(tmp_path) == ["p.bin", "p.idx", "p.meta"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_prefix_without_a_name_is_refused(tmp_path, overwrite):
    with pytest.raises(DataError, match="ends without a name, .*/corpus$"):
        write(f"{tmp_path}/", documents(300, 1), overwrite=overwrite)
    assert left(tmp_path) == []


@pytest.mark.parametrize("suffix", FILES)
def test_a_missing_file_is_named_with_the_command_that_makes_it(tmp_path, suffix):
    write(tmp_path / "p", documents(300))
    os.remove(tmp_path / f"p.{suffix}")
    with pytest.raises(DataError, match=f"p.{suffix} not found; .*preprocess_data.py"):
        Store(str(tmp_path / "p"))


@pytest.mark.parametrize("suffix", FILES)
def test_a_file_in_place_of_the_prefix_is_told(tmp_path, suffix):
    write(tmp_path / "p", documents(300))
    with pytest.raises(DataError, match=f"give the prefix of its three files, .*/p, without .{suffix}"):
        Store(str(tmp_path / f"p.{suffix}"))


@pytest.mark.parametrize("multimodal", [False, True])
@pytest.mark.parametrize("suffix", FILES)
def test_a_cut_off_file_is_refused(tmp_path, suffix, multimodal):
    """megatron-core opens a short .bin and reads uninitialised memory with mmap=False."""
    write(tmp_path / "p", mixed() if multimodal else documents(300))
    path = tmp_path / f"p.{suffix}"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(DataError, match=f"p.{suffix} .*(cut off|damaged)"):
        Store(str(tmp_path / "p"))


@pytest.mark.parametrize(
    ("offset", "value", "message"),
    [
        (0, b"TNTIDX\x00\x00", "legacy format"),
        (0, b"something", "not the index of an indexed dataset: it starts with b'something'"),
        (9, struct.pack("<Q", 2), "version 2"),
        (17, b"\x06", "dtype code 6"),
        (17, b"\x04", "holds int32 elements, but the vocabulary of 300"),
        (18, struct.pack("<Q", 0), "empty dataset"),
        (26, struct.pack("<Q", 1), "empty dataset"),
        (18, struct.pack("<Q", 39), "cut off"),
    ],
)
def test_a_header_of_another_format_is_refused(tmp_path, offset, value, message):
    write(tmp_path / "p", documents(300))
    path = tmp_path / "p.idx"
    data = path.read_bytes()
    path.write_bytes(data[:offset] + value + data[offset + len(value) :])
    with pytest.raises(DataError, match=message):
        Store(str(tmp_path / "p"))


def test_a_last_document_that_was_not_ended_is_refused(tmp_path):
    """megatron-core fails with a bare AssertionError."""
    write(tmp_path / "p", documents(300))
    path = tmp_path / "p.idx"
    path.write_bytes(path.read_bytes()[:-8] + struct.pack("<q", 39))
    with pytest.raises(DataError, match="0 to 39, not 0 to 40; the writer did not end its last document"):
        Store(str(tmp_path / "p"))


@pytest.mark.parametrize("suffix", FILES)
def test_files_of_two_datasets_are_refused(tmp_path, suffix):
    write(tmp_path / "p", documents(300, 10))
    write(tmp_path / "q", documents(300, 11))
    os.replace(tmp_path / f"q.{suffix}", tmp_path / f"p.{suffix}")
    with pytest.raises(DataError, match="belong"):
        Store(str(tmp_path / "p"))


def test_the_templates_of_conversations_are_noted(tmp_path):
    plain, *others = documents(300, 4)
    templates = ["vl2", "alignment", "vl2"]
    items = [replace(one, template=template) for one, template in zip(others, templates, strict=True)]
    assert write(tmp_path / "p", [plain, *items]).meta.templates == ("alignment", "vl2")
    assert write(tmp_path / "q", [plain]).meta.templates == ()


def test_a_meta_file_of_another_version_is_refused(tmp_path):
    import pyarrow as pa

    write(tmp_path / "p", documents(300))
    path = str(tmp_path / "p.meta")
    with pa.ipc.open_file(pa.OSFile(path)) as file:
        table = file.read_all()
    facts = json.loads(table.schema.metadata[b"megavl"]) | {"version": "2"}
    with pa.ipc.new_file(path, table.schema.with_metadata({"megavl": json.dumps(facts)})) as writer:
        writer.write_table(table)
    with pytest.raises(
        DataError,
        match="p.meta has version 2, of another release; this one knows version 3, .*; make the dataset again",
    ):
        Store(str(tmp_path / "p"))


@pytest.mark.parametrize("suffix", FILES)
def test_any_damaged_byte_is_found_or_harmless(tmp_path, suffix):
    """Opening and reading raises DataError where a sequence is not where the index says, and nothing else; verifying
    finds every change in what a reader looks at."""
    store = write(tmp_path / "p", mixed(3))
    expected, columns = records(store), 34 + 12 * len(store.lengths)
    path = tmp_path / f"p.{suffix}"
    data = path.read_bytes()
    for place in range(0, len(data), 4 if suffix == "meta" else 1):
        damaged = bytearray(data)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        try:
            store = Store(str(tmp_path / "p"))
            found = records(store)
        except DataError:
            continue
        if suffix == "meta":
            # What is between the parts of an Arrow file is not read.
            assert found == expected
        else:
            with pytest.raises(DataError, match=f"p.{suffix}"):
                store.verify()
            # A border between two documents, a mode, or the value of a token.
            assert found == expected or suffix == "bin" or place >= columns


def test_a_dataset_that_is_damaged_at_random_opens_or_is_refused(tmp_path):
    """More inputs: `python -m tests.data.fuzz_store`."""
    kinds = list(seeds(tmp_path).values())
    opened = [fuzz(tmp_path, kinds[seed % len(kinds)], seed) for seed in range(300)]
    assert 0 < sum(opened) < 300


def test_an_image_payload_with_an_impossible_padding_is_refused(tmp_path):
    write(tmp_path / "p", mixed())
    path = tmp_path / "p.bin"
    data = path.read_bytes()
    path.write_bytes(data[:12] + struct.pack("<i", 4) + data[16:])  # after the three tokens of the first sequence
    with pytest.raises(DataError, match="sequence 1 starts with 4, not a number of pad bytes"):
        Store(str(tmp_path / "p")).image(1)


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="cannot be written \\(.*; check the output prefix"):
        write(tmp_path / "file" / "p", documents(300))
