import json

import pytest

from megavl.data.document import Image, Text
from megavl.data.errors import DataError
from megavl.data.readers import jsonl


def read(path):
    return [jsonl.parse(record) for record in jsonl.records(str(path))]


def test_documents_come_in_order_with_keys_sources_and_image_bytes(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(b"not checked here")
    path = tmp_path / "in.jsonl"
    path.write_text(
        '{"text": "one \\u00e9"}\n\n'
        '{"id": 7, "segments": [{"text": "two"}, {"image": "images/a.png"}], "url": "metadata"}\n'
    )
    first, second = read(path)
    assert (first.key, first.source, first.segments) == ("in.jsonl:1", str(path), (Text("one é"),))
    assert (second.key, second.segments) == ("7", (Text("two"), Image(b"not checked here", "images/a.png")))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "cut', "is not JSON"),
        (b"[1, 2]", "is a list"),
        (b'{"text": "\xff"}', "is not UTF-8 \\(byte 0xff at offset 10"),
        (b'{"content": "x"}', 'neither "text" nor "segments" \\(its keys: \'content\'\\)'),
        (b'{"text": "x", "segments": []}', "both"),
        (b'{"text": 3}', '"text" is a number \\(3\\); it must be a string'),
        (b'{"text": null}', '"text" is null'),
        (b'{"text": ""}', '"text" is empty'),
        (b'{"text": "\\ud800"}', "surrogate"),
        (b'{"text": "x", "id": [1]}', '"id" is a list'),
        (b'{"segments": "x"}', '"segments" is a string'),
        (b'{"segments": []}', '"segments" is empty; give at least one segment'),
        (b'{"segments": ["x"]}', "segment 0 is"),
        (b'{"segments": [{"text": "x"}, {}]}', "segment 1 is"),
        (b'{"segments": [{"text": "x", "image": "y"}]}', "segment 0 is"),
        (b'{"segments": [{"image": ""}]}', "segment 0 is"),
        (b'{"segments": [{"text": ""}]}', "segment 0 is empty"),
        (b'{"segments": [{"image": "absent.png"}]}', "absent.png cannot be read \\(No such file"),
        (b'{"segments": [{"image": "."}]}', "cannot be read \\(Is a directory"),
        (b'{"segments": [{"image": "a\\u0000b"}]}', "cannot be read \\(embedded null byte"),
    ],
)
def test_a_malformed_record_is_named_by_file_and_line(tmp_path, line, message):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"text": "good"}\n' + line + b"\n")
    with pytest.raises(DataError, match=message) as error:
        read(path)
    assert str(error.value).startswith(f"{path}:2: ")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match="absent.jsonl: cannot be read"):
        read(tmp_path / "absent.jsonl")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"segments": [{"text": "x"}, {"image": "a"}]}, True),
        ({"segments": [{"text": 'an "image" in words'}]}, False),
        ({"text": "x", "image": "metadata"}, False),
        ({"segments": [7, "image"]}, False),
    ],
)
def test_images_are_seen_without_parsing_the_document(value, expected):
    assert jsonl.has_image(jsonl.Record("f", 1, json.dumps(value).encode())) is expected
