import io
from functools import partial

import PIL.Image
import pytest

from megavl.data.document import Image, Text, Token
from megavl.data.errors import DataError
from megavl.data.grounding import Object, converse, locate
from megavl.data.readers.record import Place, Record, to_document
from megavl.data.template import TEMPLATES


def png(width: int, height: int) -> bytes:
    file = io.BytesIO()
    PIL.Image.new("RGB", (width, height)).save(file, "PNG")
    return file.getvalue()


FILES = {name: name.encode() for name in ("a", "b", "c")} | {"wide": png(40, 20), "tall": png(20, 40)}


def image(reference: str) -> bytes:
    if reference not in FILES:
        raise DataError(f"image {reference} is not there")
    return FILES[reference]


def document(values: dict, template: str = "plain"):
    return to_document(Record(values, image, TEMPLATES[template]), Place("in/x.jsonl", 3))


def segments(values: dict):
    return document(values).segments


A, B, C, WIDE, TALL = (Image(data, name) for name, data in FILES.items())
read = partial(Text, supervised=False)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"text": "x", "url": "metadata"}, (Text("x"),)),
        ({"text": "x", "image": None}, (Text("x"),)),
        ({"image": "a", "text": "x"}, (A, Text("x"))),
        ({"image": ["a", "b"], "caption": "x"}, (A, B, Text("x"))),
        ({"images": ["a"], "text": "the word <image> stays"}, (A, Text("the word <image> stays"))),
        ({"image": b"bytes", "text": "x"}, (Image(b"bytes", "image 0"), Text("x"))),
        ({"image": {"bytes": b"bytes", "path": "p"}, "text": "x"}, (Image(b"bytes", "p"), Text("x"))),
        ({"image": {"bytes": None, "path": "b"}, "text": "x"}, (B, Text("x"))),
        (
            {"segments": [{"text": "x"}, {"image": "a"}, {"token": "<|ref|>"}, {"text": "y", "supervised": False}]},
            (Text("x"), A, Token("<|ref|>"), read("y")),
        ),
        ({"segments": [{"text": "x", "image": None}, {"text": None, "image": "a"}]}, (Text("x"), A)),
        (
            {
                "text_list": ["One.", "Two.", "Three."],
                "image_info": [
                    {"image_name": "a", "matched_text_index": 2, "raw_url": "u"},
                    {"image_name": "b", "matched_text_index": 0},
                    {"image_name": "c", "matched_text_index": 2},
                ],
            },
            (B, Text("One."), Text(" Two."), A, C, Text("Three.")),
        ),
        ({"text_list": ["One.", "Two."]}, (Text("One."), Text(" Two."))),
        (
            {"texts": ["x", None, "y", "z"], "images": [None, "a", None, None]},
            (Text("x"), A, Text("y"), Text("\n\nz")),
        ),
        (
            {
                "texts": [{"user": "q", "assistant": "r", "source": "s"}, {"user": "t", "assistant": "u"}],
                "images": ["a"],
            },
            (A, read("q"), Text("r"), read("t"), Text("u")),
        ),
    ],
)
def test_layouts(values, expected):
    assert segments(values) == expected


TALK = ["<image>\nfirst <image>?", "answer", "second?", "<image>"]


@pytest.mark.parametrize(
    "values",
    [
        {
            "image": ["a", "b", "c"],
            "conversations": [
                {"from": ("human", "gpt")[number % 2], "value": value} for number, value in enumerate(TALK)
            ],
        },
        {
            "images": ["a", "b", "c"],
            "messages": [
                {"role": ("user", "assistant")[number % 2], "content": value} for number, value in enumerate(TALK)
            ],
        },
        {
            "images": ["a", "c"],
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "image", "text": None},
                        {"type": "text", "text": "\nfirst "},
                        {"type": "image", "image": "b"},
                        {"type": "text", "text": "?"},
                    ],
                },
                {"role": "assistant", "content": "answer"},
                {"role": "user", "content": "second?"},
                {"role": "assistant", "content": [{"type": "image"}]},
            ],
        },
    ],
)
def test_images_of_a_conversation_are_where_their_markers_are(values):
    assert segments(values) == (A, read("\nfirst "), B, read("?"), Text("answer"), read("second?"), C)


def test_a_conversation_without_images():
    talk = {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}
    assert segments(talk) == (read("q"), Text("a"))


def test_tokens_are_written_by_parts_and_not_by_words():
    talk = [
        {"role": "user", "content": [{"text": "Locate "}, {"token": "<|ref|>"}, {"text": "the cat"}]},
        {"role": "assistant", "content": "<|ref|>"},
    ]
    expected = (read("Locate "), Token("<|ref|>", False), read("the cat"), Text("<|ref|>"))
    assert segments({"messages": talk}) == expected


DOG = {"query": "dog", "boxes": [[0, 5.5, 40, 20]]}


def test_grounding():
    """Boxes are measured against the image that they are in, of several the last."""
    dog, cat = Object("dog", ((0, 5.5, 40, 20),)), Object("cat", ())
    write = TEMPLATES["vl2"].write
    found = document({"image": "wide", "grounding": [DOG, {"query": "cat", "boxes": []}]}, "vl2")
    assert found.segments == write(locate(WIDE, (40, 20), [dog, cat]))
    found = document({"images": ["tall", "wide"], "question": "Which?", "grounding": [{"text": "A "}, DOG]}, "vl2")
    assert found.segments == write(converse([TALL, WIDE], (40, 20), "Which?", ["A ", dog]))
    with pytest.raises(DataError, match=r"box \[0, 5.5, 40, 20\] leaves the image of 20 x 40 pixels"):
        document({"images": ["wide", "tall"], "question": "Which?", "grounding": [DOG]}, "vl2")


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({}, "x.jsonl:3"),
        ({"id": 7}, "7"),
        ({"key": "k"}, "k"),
        ({"id": "i", "key": "k"}, "i"),
        ({"id": None, "key": "k"}, "k"),
    ],
)
def test_keys(values, key):
    found = document({"text": "x"} | values)
    assert (found.key, found.source) == (key, "in/x.jsonl")


TURNS = [{"from": "human", "value": "<image>q"}, {"from": "gpt", "value": "a"}]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, r"has no key of a layout \(its keys: none\)"),
        (
            {"content": "x", "image": "a"},
            r"has no key of a layout \(its keys: \"content\", \"image\"\); .*\"text\", \"cap",
        ),
        ({"text": None}, r'no key of a layout \(its keys: "text" \(null\)\)'),
        ({"text": "x", "segments": []}, 'has "text" and "segments"'),
        ({"text": "x", "caption": "y", "image": "a"}, 'has "text" and "caption"'),
        ({"conversations": TURNS, "messages": [], "image": "a"}, 'has "conversations" and "messages"'),
        ({"text": 3}, r'"text" is a number \(3\); it must be a string'),
        ({"text": ["x"]}, '"text" is a list'),
        ({"text": ""}, '"text" is empty'),
        ({"text": "\ud800"}, "half of a surrogate pair .* at character 0"),
        ({"text": "a\0"}, "a NUL byte \\(character 1\\)"),
        ({"text": "x", "id": [1]}, '"id" is a list'),
        ({"text": "x", "id": True}, '"id" is a boolean'),
        ({"text": "x", "key": ""}, '"key" is empty'),
        ({"text": "x", "id": "\udc00"}, '"id" holds half'),
        ({"text": "x", "image": "a", "images": ["b"]}, 'both "image" and "images"'),
        ({"text": "x", "image": 3}, r"image 0 is a number \(3\); give a path"),
        ({"text": "x", "image": b""}, r"image 0 is bytes \(<0 bytes>\)"),
        ({"text": "x", "image": {"bytes": None, "path": None}}, "image 0 is an object"),
        ({"text": "x", "image": {"bytes": b"", "path": "a"}}, "image 0 is an object"),
        ({"text": "x", "image": ["a", None]}, "image 1 is null"),
        ({"text": "x", "image": ""}, "image 0 is empty"),
        ({"text": "x", "image": "a\0"}, "image 0 holds a NUL byte"),
        ({"text": "x", "image": "z"}, "image 0: image z is not there"),
        ({"caption": "x"}, 'has "caption" but no "image"'),
        ({"segments": "x"}, '"segments" is a string'),
        ({"segments": []}, '"segments" is empty; give at least one entry'),
        ({"segments": ["x"]}, "segment 0 is a string"),
        ({"segments": [{"text": "x"}, {}]}, "segment 1 is an object"),
        ({"segments": [{"text": "x", "image": "a"}]}, "segment 0 is an object"),
        ({"segments": [{"text": ""}]}, "segment 0 is empty"),
        ({"segments": [{"image": "a", "supervised": False}]}, "segment 0 is an object"),
        ({"segments": [{"text": "x", "supervised": 0}]}, 'segment 0: "supervised" is a number'),
        ({"segments": [{"image": "z"}]}, "segment 0: image z is not there"),
        ({"conversations": {}}, '"conversations" is an object'),
        ({"conversations": [3]}, "turn 0 is a number"),
        ({"conversations": [{"from": "human"}]}, 'turn 0 is an object .*; a turn has "from" and "value"'),
        (
            {"conversations": [{"from": "robot", "value": "x"}]},
            r'turn 0: "from" is a string \(\'robot\'\); it is one of',
        ),
        ({"conversations": [{"from": [], "value": "x"}]}, 'turn 0: "from" is a list'),
        ({"conversations": [{"from": "human", "value": 3}]}, "turn 0 is a number"),
        ({"conversations": [{"from": "human", "value": "\0"}]}, "turn 0 holds a NUL byte"),
        ({"conversations": TURNS}, "has 1 <image> markers and 0 images"),
        ({"conversations": TURNS, "image": ["a", "b"]}, "has 1 <image> markers and 2 images"),
        ({"conversations": TURNS[1:]}, "a turn of the assistant is where one of the user is due"),
        ({"conversations": []}, "does not end with an answer"),
        ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, "turn 0 has the part an object"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "url": "u"}]}]}, "turn 0 has the part"),
        ({"grounding": [DOG]}, 'has "grounding" but no "image"'),
        ({"image": "wide", "grounding": DOG}, '"grounding" is an object'),
        ({"image": "wide", "grounding": []}, '"grounding" is empty'),
        ({"image": "wide", "grounding": ["dog"]}, "grounding 0 is a string"),
        ({"image": "wide", "grounding": [DOG, {"query": "cat"}]}, "grounding 1 is an object .*; it is"),
        ({"image": "wide", "grounding": [{"query": "", "boxes": []}]}, 'grounding 0: "query" is empty'),
        ({"image": "wide", "grounding": [{"query": "x", "boxes": [0, 0, 1, 1]}]}, "0 is a number .*; a box is"),
        ({"image": "wide", "grounding": [{"query": "x", "boxes": [[0, 0, 1]]}]}, '"boxes": 0 is a list'),
        ({"image": "wide", "grounding": [{"query": "x", "boxes": [[0, 0, 1, True]]}]}, '"boxes": 0 is a list'),
        ({"image": "wide", "grounding": [{"query": "x", "boxes": [[0, 0, 41, 1]]}]}, "leaves the image of 40 x 20"),
        ({"image": "wide", "grounding": [{"query": "x", "boxes": [[3, 3, 3, 9]]}]}, "holds nothing"),
        ({"image": "a", "grounding": [DOG]}, "image a: 1 bytes that cannot be decoded"),
        ({"image": "wide", "grounding": [DOG, {"text": "x"}]}, 'has 1 images and 1 parts of text but no "question"'),
        ({"images": ["tall", "wide"], "grounding": [DOG]}, "has 2 images and 0 parts of text"),
        ({"image": "wide", "question": "", "grounding": [DOG]}, '"question" is empty'),
        ({"text_list": "x"}, '"text_list" is a string'),
        ({"text_list": []}, '"text_list" is empty'),
        ({"text_list": ["x"], "image_info": 3}, '"image_info" is a number'),
        ({"text_list": ["x"], "image_info": [3]}, "image_info 0 is a number"),
        ({"text_list": ["x"], "image_info": [{"image_name": "a", "matched_text_index": 1}]}, "below 1, the number of"),
        ({"text_list": ["x"], "image_info": [{"image_name": "a", "matched_text_index": -1}]}, "image_info 0"),
        ({"text_list": ["x"], "image_info": [{"image_name": None, "matched_text_index": 0}]}, "image_info 0 is null"),
        ({"text_list": ["x", ""]}, "text 1 is empty"),
        ({"texts": ["x"]}, '"images" is null; it must be a list'),
        ({"texts": ["x"], "images": []}, '"texts" has 1 entries and "images" 0'),
        ({"texts": ["x"], "images": ["a"]}, "place 0 has both of text and image"),
        ({"texts": [None], "images": [None]}, "place 0 has neither of text and image"),
        ({"texts": [], "images": []}, '"texts" is empty'),
        ({"texts": [{"user": "x"}], "images": ["a"]}, 'text 0: "assistant" is null'),
        ({"texts": [{"user": "x", "assistant": "y"}, 3], "images": ["a"]}, "text 1 is a number"),
    ],
)
def test_a_malformed_record_is_told_what_is_wrong(values, message):
    with pytest.raises(DataError, match=message):
        document(values)


def test_an_error_is_named_by_file_and_number():
    assert str(Place("a.jsonl", 7).refuse(DataError("is wrong"))) == "a.jsonl:7: is wrong"


def test_a_message_shows_little_of_what_is_large():
    with pytest.raises(DataError) as error:
        document({"text": {"bytes": b"x" * 10**6, "words": ["y" * 10**6] * 1000}})
    assert len(str(error.value)) < 300


@pytest.mark.parametrize(
    ("values", "written"),
    [
        ({"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}, True),
        ({"conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}]}, True),
        ({"texts": [{"user": "x", "assistant": "y"}]}, True),
        ({"image": "wide", "grounding": [DOG]}, True),
        ({"texts": ["x"], "images": [None]}, False),
        ({"image": "a", "text": "x"}, False),
        ({"segments": [{"text": "x"}]}, False),
    ],
)
def test_a_conversation_says_which_template_wrote_it(values, written):
    assert document(values, "vl2").template == ("vl2" if written else None)
