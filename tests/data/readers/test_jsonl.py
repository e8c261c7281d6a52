import gzip
import tracemalloc

import PIL.Image
import pyarrow as pa
import pytest
from pyarrow import parquet

from megavl.data.document import Document, Image, Text
from megavl.data.errors import DataError
from megavl.data.readers import jsonl
from megavl.data.readers.reader import ReadOptions
from megavl.data.readers.registry import READERS
from tests.data.readers.reading import PICTURE, documents, read, write_jsonl


def test_documents_come_in_order_with_keys_sources_and_image_bytes(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(PICTURE)
    path = tmp_path / "in.jsonl"
    path.write_text(
        '{"text": "one \\u00e9"}\n\r\n'
        '{"id": 7, "segments": [{"text": "two"}, {"image": "images/a.png"}], "url": "metadata"}'
    )
    assert documents(path) == [
        Document("in.jsonl:1", str(path), (Text("one é"),)),
        Document("7", str(path), (Text("two"), Image(PICTURE, "images/a.png"))),
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "cut', "is not JSON"),
        (b"[1, 2]", r"is a list \(\[1, 2\]\)"),
        (b"null", "is null"),
        (b'{"text": "\xff"}', "is not UTF-8 \\(byte 0xff at offset 10"),
        (b'{"text": "x", "text": "y"}', 'the key "text" is repeated'),
        (b'{"text": "x", "meta": [{"a": 1, "a": 1}]}', 'the key "a" is repeated'),
        (b'{"text": "\\ud800"}', "surrogate"),
        (b'{"text": "a\\u0000b"}', "NUL byte \\(character 1\\)"),
        (b'{"text": ' + b"[" * 100_000 + b"}", "is not JSON"),
        (b'{"text": "x", "id": ' + b"7" * 5000 + b"}", "is not JSON"),
    ],
)
def test_a_malformed_line_is_named_and_the_rest_goes_on(tmp_path, line, message):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"text": "good"}\n' + line + b'\n{"text": "also good"}\n')
    first, error, last = read(path)
    assert (first.key, last.key) == ("bad.jsonl:1", "bad.jsonl:3")
    with pytest.raises(DataError, match=message):
        raise error
    assert str(error).startswith(f"{path}:2: ")


def test_a_box_outside_its_image_is_named_and_the_rest_goes_on(tmp_path):
    """Also in a table, whose rows have all keys."""
    PIL.Image.new("RGB", (40, 20)).save(tmp_path / "a.png")
    rows = [
        {"image": "a.png", "grounding": [{"query": "dog", "boxes": boxes}]}
        for boxes in ([[0, 0, 40, 20]], [[0, 0, 40, 21]], [])
    ]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    for path in (write_jsonl(tmp_path / "a.jsonl", *rows), tmp_path / "a.parquet"):
        first, error, last = read(path, template="vl2")
        assert str(error).startswith(f"{path}:2: box [0, 0, 40, 21] leaves the image of 40 x 20 pixels")
        assert [segments[-3] for segments in (first.segments, last.segments)] == [
            Text("[[0, 0, 999, 999]]"),
            Text("[]"),
        ]


@pytest.mark.parametrize("ending", [b"", b"\n", b"\n\n"])
@pytest.mark.parametrize("part_bytes", [1, 7, 40, 10_000])
def test_parts_hold_whole_lines_and_know_their_numbers(tmp_path, part_bytes, ending):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join(b'{"text": "%s"}' % (b"x" * length) for length in range(1, 60)) + ending)
    parts = list(jsonl.split(str(path), part_bytes))
    assert [part.start for part in parts] == [0, *(part.stop for part in parts[:-1])]
    assert sum(part.size_bytes for part in parts) == path.stat().st_size
    assert all(part.size_bytes < part_bytes + 80 for part in parts)
    found = [document for part in parts for document in jsonl.read(part, ReadOptions())]
    assert [document.key for document in found] == [f"a.jsonl:{line}" for line in range(1, 60)]
    assert found == documents(path)


@pytest.mark.parametrize("codec", ["gzip", "zstd"])
def test_a_compressed_file_is_one_part_and_reads_as_the_plain_one(tmp_path, codec):
    lines = b"".join(b'{"text": "number %d"}\n' % number for number in range(5000))
    (tmp_path / "a.jsonl").write_bytes(lines)
    path = tmp_path / ("a.jsonl.gz" if codec == "gzip" else "a.jsonl.zst")
    with pa.CompressedOutputStream(str(path), codec) as file:
        file.write(lines)
    assert len(list(jsonl.split(str(path), 100))) == 1
    plain = documents(tmp_path / "a.jsonl")
    assert [document.segments for document in documents(path)] == [document.segments for document in plain]


def test_damaged_compression_ends_the_file_with_its_name(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    data = gzip.compress(b"".join(b'{"text": "number %d"}\n' % number for number in range(5000)))
    path.write_bytes(data[:-20])
    with pytest.raises(DataError, match=r"a\.jsonl\.gz:\d+: the file cannot be read further \(Truncated"):
        read(path)


def test_a_giant_line_is_refused_without_being_held(tmp_path):
    path = tmp_path / "a.jsonl"
    with path.open("wb") as file:
        file.write(b'{"text": "first"}\n{"text": "')
        for _ in range(64):
            file.write(b"x" * (1 << 20))
        file.write(b'"}\n{"text": "last"}\n')
    tracemalloc.start()
    first, error, last = read(path, part_bytes=1 << 20, max_record_bytes=1 << 20)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (first.segments, last.segments) == ((Text("first"),), (Text("last"),))
    assert str(error).startswith(f"{path}:2: is larger than --max-record-bytes 1,048,576")
    assert peak < 8 << 20


def test_a_line_at_the_limit_is_read(tmp_path):
    line = b'{"text": "x"}'
    path = tmp_path / "a.jsonl"
    path.write_bytes(line + b"\n" + line)
    assert len(documents(path, max_record_bytes=len(line))) == 2


def test_what_is_behind_the_limit_is_not_lost_unseen(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "x"}' + b" " * 1000 + b'{"text": "y"}\n')
    (error,) = read(path, max_record_bytes=100)
    assert "a.jsonl:1: is larger than --max-record-bytes 100" in str(error)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match="absent.jsonl: cannot be read \\(No such file"):
        read(tmp_path / "absent.jsonl")


def test_an_empty_file_has_no_parts(tmp_path):
    (tmp_path / "a.jsonl").touch()
    assert list(jsonl.split(str(tmp_path / "a.jsonl"), 100)) == []


@pytest.mark.parametrize("suffix", sorted({suffix for reader in READERS for suffix in reader.SUFFIXES} - {".jsonl"}))
def test_an_empty_file_of_any_other_format_is_an_error(tmp_path, suffix):
    (tmp_path / f"a{suffix}").touch()
    with pytest.raises(DataError, match=f"a{suffix}: is empty.*make it again"):
        documents(tmp_path / f"a{suffix}")


def test_a_suffix_in_capitals_is_known(tmp_path):
    assert documents(write_jsonl(tmp_path / "A.JSONL", {"text": "x"}))
