import os

import pyarrow as pa
import pytest
from pyarrow import ipc, parquet

from megavl.data.document import Document, Image, Text
from megavl.data.errors import DataError
from megavl.data.readers import table
from megavl.data.readers.reader import ReadOptions
from tests.data.readers.reading import PICTURE, documents, read

FORMATS = ["parquet", "stream", "file"]


def write(folder, form: str, values: pa.Table, rows: int = 1000):
    """A file of the format with so many rows per group or batch."""
    if form == "parquet":
        path = folder / "a.parquet"
        parquet.write_table(values, path, row_group_size=rows)
        return path
    path = folder / f"{form}.arrow"
    new = ipc.new_stream if form == "stream" else ipc.new_file
    with pa.OSFile(str(path), "wb") as sink, new(sink, values.schema) as writer:
        writer.write_table(values, max_chunksize=rows)
    return path


@pytest.mark.parametrize("form", FORMATS)
def test_rows_are_records_with_images_as_bytes_structs_and_paths(tmp_path, form):
    (tmp_path / "a.png").write_bytes(PICTURE)
    images = pa.array(
        [{"bytes": PICTURE, "path": "/where/it/was.png"}, {"bytes": None, "path": "a.png"}, None, {"bytes": b"x"}],
        pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
    )
    values = pa.table(
        {"caption": ["one", "two", "three", "four"], "image": images, "id": [5, None, 7, 8], "n": [0] * 4}
    )
    path = write(tmp_path, form, values)
    first, second, error, last = read(path)
    assert first == Document("5", str(path), (Image(PICTURE, "/where/it/was.png"), Text("one")))
    assert second == Document(f"{path.name}:2", str(path), (Image(PICTURE, "a.png"), Text("two")))
    assert str(error) == f'{path}:3: has "caption" but no "image"; name the image, or call it "text"'
    assert last.segments == (Image(b"x", "image 0"), Text("four"))


@pytest.mark.parametrize("form", FORMATS)
def test_nested_columns(tmp_path, form):
    values = pa.Table.from_pylist(
        [
            {"segments": [{"text": "look:"}, {"image": PICTURE}, {"token": "<|ref|>"}], "texts": None, "images": None},
            {"texts": ["above", None, "below"], "images": [None, {"bytes": PICTURE, "path": "x.png"}, None]},
        ]
    )
    first, second = documents(write(tmp_path, form, values))
    assert [type(segment).__name__ for segment in first.segments] == ["Text", "Image", "Token"]
    assert second.segments == (Text("above"), Image(PICTURE, "x.png"), Text("below"))


@pytest.mark.parametrize("form", FORMATS)
def test_parts_are_groups_of_rows_and_know_their_numbers(tmp_path, form):
    values = pa.table({"text": [f"{number} " + "x" * (number % 7) for number in range(100)]})
    path = write(tmp_path, form, values, rows=8)
    parts = list(table.split(str(path), 1))
    assert len(parts) == 13 and [part.first for part in parts] == list(range(1, 101, 8))
    found = [document for part in parts for document in table.read(part, ReadOptions())]
    assert [document.key for document in found] == [f"{path.name}:{number}" for number in range(1, 101)]
    assert found == documents(path)
    assert 1 < len(list(table.split(str(path), 300))) < 13


@pytest.mark.parametrize("form", FORMATS)
def test_a_value_that_is_no_text_is_named_and_the_rest_goes_on(tmp_path, form):
    texts = pa.array([b"first", b"\xff\xfe", b"a\0b", b"", None, b"last"]).view(pa.string())
    path = write(tmp_path, form, pa.table({"text": texts}))
    first, *errors, last = read(path)
    assert (first.segments, last.segments) == ((Text("first"),), (Text("last"),))
    for number, (error, message) in enumerate(
        zip(errors, ["Invalid UTF8", "NUL byte", '"text" is empty', '"text" \\(null\\)'], strict=True), start=2
    ):
        with pytest.raises(DataError, match=message):
            raise error
        assert str(error).startswith(f"{path}:{number}: ")


@pytest.mark.parametrize("form", FORMATS)
def test_a_row_above_the_limit_is_refused(tmp_path, form):
    path = write(tmp_path, form, pa.table({"text": ["first", "x" * 2000, "last"]}))
    first, error, last = read(path, max_record_bytes=1000)
    assert (first.segments, last.segments) == ((Text("first"),), (Text("last"),))
    assert str(error).startswith(f"{path}:2: is larger than --max-record-bytes 1,000")


@pytest.mark.parametrize("form", FORMATS)
def test_damage_is_named_by_file(tmp_path, form):
    path = write(tmp_path, form, pa.table({"text": ["x" * 100] * 100}))
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(DataError, match="is damaged or of another format"):
        read(path)
    path.write_bytes(b"neither one nor the other")
    with pytest.raises(DataError, match="is damaged or of another format"):
        read(path)


def test_offsets_that_point_outside_are_refused(tmp_path):
    path = write(tmp_path, "stream", pa.table({"text": ["abcdefgh", "ijklmnop"]}))
    data = path.read_bytes()
    offsets = b"".join(offset.to_bytes(4, "little") for offset in (0, 8, 16))
    assert data.count(offsets) == 1
    path.write_bytes(data.replace(offsets, offsets[:4] + (10**6).to_bytes(4, "little") + offsets[8:]))
    assert all(isinstance(error, DataError) for error in read(path))


@pytest.mark.parametrize("form", FORMATS)
def test_columns_must_be_those_of_a_layout(tmp_path, form):
    with pytest.raises(DataError, match="has no column that is read \\(its columns: TEXT, URL\\)"):
        read(write(tmp_path, form, pa.table({"TEXT": ["x"], "URL": ["y"]})))
    with pytest.raises(DataError, match="more than one column text"):
        read(write(tmp_path, form, pa.table([["x"], ["y"]], names=["text", "text"])))


@pytest.mark.parametrize("form", FORMATS)
def test_no_rows(tmp_path, form):
    assert documents(write(tmp_path, form, pa.table({"text": pa.array([], pa.string())}))) == []


@pytest.mark.parametrize("form", ["parquet", "stream"])
def test_few_rows_are_in_memory_however_large_their_group(tmp_path, form, monkeypatch):
    monkeypatch.setattr(table, "_ROWS_BYTES", 1 << 20)
    values = pa.table({"text": ["x"] * 400, "image": [os.urandom(1 << 16)] * 400})
    if form == "parquet":
        path = tmp_path / "a.parquet"
        # A page ends after a batch of rows, and is read as a whole.
        parquet.write_table(values, path, use_dictionary=False, write_batch_size=8)
    else:
        path = write(tmp_path, form, values)
    del values
    (part,) = table.split(str(path), 1)
    assert part.size_bytes > 25e6
    before = pa.total_allocated_bytes()
    assert max(pa.total_allocated_bytes() for _ in table.read(part, ReadOptions())) - before < 8e6


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match="absent.parquet: cannot be read \\(No such file"):
        read(tmp_path / "absent.parquet")
