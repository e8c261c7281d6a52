import gzip
import json
import tracemalloc

import pytest

from megavl.data.document import Document, Text
from megavl.data.errors import DataError
from megavl.data.readers import json_array
from megavl.data.readers.reader import ReadOptions
from tests.data.readers.reading import documents, read


def array(path, text: str | bytes):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_records_come_in_order_and_are_numbered_by_their_place(tmp_path):
    path = array(
        tmp_path / "a.json", '\ufeff [\n {"text": "one \\u00e9"},{"id": "x", "text": "é𝄞"}\t,\r\n{"text":"]"} ]\n'
    )
    assert documents(path) == [
        Document("a.json:1", str(path), (Text("one é"),)),
        Document("x", str(path), (Text("é𝄞"),)),
        Document("a.json:3", str(path), (Text("]"),)),
    ]


def test_records_lie_anywhere_in_the_blocks_that_are_read(tmp_path):
    """Borders of blocks fall inside of characters, escapes and numbers, and a record is larger than a block."""
    texts = ["é" * length + "\\" for length in (1, 3, 70_000, 131_071, 400_000, 5)]
    values = [{"text": text, "id": 1234567890} for text in texts]
    plain = array(tmp_path / "a.json", json.dumps(values, ensure_ascii=False, indent=3))
    packed = array(tmp_path / "a.json.gz", gzip.compress(plain.read_bytes()))
    for path in (plain, packed):
        assert [document.segments[0].text for document in documents(path)] == texts


@pytest.mark.parametrize("text", ["[]", " [ ] \n"])
def test_no_records(tmp_path, text):
    assert documents(array(tmp_path / "a.json", text)) == []


@pytest.mark.parametrize(
    ("element", "message"),
    [
        (b"12", r"is a number \(12\); a record is one JSON object"),
        (b'{"text": "x", "text": "y"}', 'the key "text" is repeated'),
        (b'{"text": "\xff"}', "is not UTF-8 \\(byte 0xff at character 10 of the record"),
        (b'{"text": "\\udcff"}', "half of a surrogate pair"),
        (b'{"text": "' + b"x" * 2000 + b'"}', "larger than --max-record-bytes 1,000"),
    ],
)
def test_a_malformed_record_is_named_and_the_rest_goes_on(tmp_path, element, message):
    path = array(tmp_path / "a.json", b'[{"text": "first"}, ' + element + b', {"text": "last"}]')
    first, error, last = read(path, max_record_bytes=1000)
    assert (first.key, last.key) == ("a.json:1", "a.json:3")
    with pytest.raises(DataError, match=message):
        raise error
    assert str(error).startswith(f"{path}:2: ")


@pytest.mark.parametrize(
    ("tail", "message"),
    [
        ("", "it ends without ]"),
        (" ", "the end of the file is where , or ] belongs"),
        (",", "Expecting value at character 0"),
        (",]", "Expecting value"),
        (', {"text": "cut', "Unterminated string"),
        (", 12", "it ends without ]"),
        ("] []", "goes on behind the array"),
        (' {"text": "x"}]', "{ is where , or ] belongs"),
        (", " + "[" * 100_000, "recursion"),
        (", {'text'}" + " " * 2000 + "]", "no JSON value ends within --max-record-bytes 1,000 \\(Expecting property"),
    ],
)
def test_what_is_no_array_ends_the_file_with_the_record_named(tmp_path, tail, message):
    path = array(tmp_path / "a.json", '[{"text": "first"}' + tail)
    with pytest.raises(DataError, match=message) as error:
        read(path, max_record_bytes=1000)
    assert str(error.value).startswith(f"{path}:")


def test_lines_of_objects_are_told_to_be_jsonl(tmp_path):
    with pytest.raises(DataError, match=r"a\.json:1: .* one per line is \.jsonl"):
        read(array(tmp_path / "a.json", '{"text": "x"}\n'))


def test_memory_is_that_of_a_record_whatever_the_file(tmp_path):
    path = tmp_path / "a.json"
    with path.open("w") as file:
        file.write("[" + ",\n".join(json.dumps({"text": "x" * 50_000}) for _ in range(400)) + "]")

    assert path.stat().st_size > 20e6
    (part,) = json_array.split(str(path), 1)
    tracemalloc.start()
    assert sum(1 for _ in json_array.read(part, ReadOptions())) == 400
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4e6
