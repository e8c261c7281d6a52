"""Boxes in steps of 0 to 999, and the three forms in which DeepSeek-VL2 is asked where things are."""

import random
from functools import partial

import pytest

from megavl.data.document import Image, Text, Token
from megavl.data.errors import DataError
from megavl.data.grounding import Object, converse, locate, normalised
from megavl.data.template import TEMPLATES, Turn

PICTURE, OTHER = Image(b"bytes", "a.png"), Image(b"bytes", "b.png")
SIZE = (640, 480)


@pytest.mark.parametrize(
    ("box", "size", "steps"),
    [
        ((0, 0, 640, 480), SIZE, [0, 0, 999, 999]),
        ((320, 120, 480, 360), SIZE, [500, 250, 749, 749]),  # 499.5, 249.75 and 749.25 to the nearest
        ((0.25, 1, 1.5, 2), (2, 4), [125, 250, 749, 500]),
        ((998, 0, 999, 999), (999, 999), [998, 0, 999, 999]),  # as many pixels as steps
        ((10, 10, 11, 11), (20000, 20000), [0, 0, 1, 1]),  # 0.4995 and 0.5495
    ],
)
def test_steps_of_a_box(box, size, steps):
    assert normalised(box, size) == steps


def test_a_box_comes_back_as_the_released_code_reads_it():
    """Within half a step and the truncation of `parse_ref_bbox`."""
    random_ = random.Random(0)
    for _ in range(500):
        size = random_.randint(2, 1800), random_.randint(2, 1800)
        left, top = random_.randrange(size[0]), random_.randrange(size[1])
        box = left, top, random_.randint(left + 1, size[0]), random_.randint(top + 1, size[1])
        for step, pixel, side in zip(normalised(box, size), box, size * 2, strict=True):
            assert -0.5 * side / 999 - 1 < int(step / 999 * side) - pixel <= 0.5 * side / 999


@pytest.mark.parametrize(
    ("box", "message"),
    [
        ((-1, 0, 5, 5), r"box \[-1, 0, 5, 5\] leaves the image of 640 x 480 pixels"),
        ((0, 0, 641, 5), "leaves the image"),
        ((0, 0, 5, 480.5), "leaves the image"),
        ((0, float("nan"), 5, 5), "leaves the image"),
        ((5, 0, 5, 5), r"box \[5, 0, 5, 5\] holds nothing: left must be below right"),
        ((0, 9, 5, 3), "holds nothing"),
    ],
)
def test_boxes_that_are_none(box, message):
    with pytest.raises(DataError, match=message):
        normalised(box, SIZE)


def spelled(segments) -> str:
    """A document as the paper prints it."""
    names = {Text: lambda s: s.text, Token: lambda s: s.name or "<eos>", Image: lambda s: "<image>"}
    return "".join(names[type(segment)](segment) for segment in segments)


def said(turns: list[Turn]) -> list[tuple[str, str]]:
    return [(turn.role, spelled(turn.segments)) for turn in turns]


def test_visual_grounding():
    objects = [Object("red circle", ((0, 0, 320, 240), (320, 240, 640, 480))), Object("blue square", ())]
    turns = locate(PICTURE, SIZE, objects)
    assert said(turns) == [
        ("user", "<image>\nLocate <|ref|>red circle<|/ref|> in the given image."),
        ("assistant", "<|ref|>red circle<|/ref|><|det|>[[0, 0, 500, 500], [500, 500, 999, 999]]<|/det|>"),
        ("user", "Locate <|ref|>blue square<|/ref|> in the given image."),
        ("assistant", "<|ref|>blue square<|/ref|><|det|>[]<|/det|>"),
    ]
    assert spelled(TEMPLATES["vl2"].write(turns[:2])) == (
        "<｜begin▁of▁sentence｜><|User|>: <image>\nLocate <|ref|>red circle<|/ref|> in the given image.\n\n"
        "<|Assistant|>:<|ref|>red circle<|/ref|><|det|>[[0, 0, 500, 500], [500, 500, 999, 999]]<|/det|><eos>"
    )


def test_a_question_is_read_and_its_answer_learned():
    written = TEMPLATES["vl2"].write(locate(PICTURE, SIZE, [Object("dog", ((0, 0, 64, 48),))]))
    learned = [segment for segment in written if not isinstance(segment, Image) and segment.supervised]
    assert learned == [
        Token("<|ref|>"),
        Text("dog"),
        Token("<|/ref|>"),
        Token("<|det|>"),
        Text("[[0, 0, 100, 100]]"),
        Token("<|/det|>"),
        Token(),
    ]


def test_grounded_conversation():
    question = "Can you describe the content of the image?"
    dogs = Object("dogs", ((0, 0, 640, 480),))
    assert said(converse([PICTURE], SIZE, question, ["Two ", dogs, " are running on the grass."])) == [
        ("user", "<image>\n<|grounding|>Can you describe the content of the image?"),
        ("assistant", "Two <|ref|>dogs<|/ref|><|det|>[[0, 0, 999, 999]]<|/det|> are running on the grass."),
    ]


def test_in_context_grounding():
    question = "The first image shows an object within the red bounding box. Please identify the object of the same "
    question += "category in the second image."
    assert said(converse([PICTURE, OTHER], SIZE, question, [Object("cat", ((0, 0, 640, 240),))])) == [
        ("user", f"<image>\n<image>\n<|grounding|>{question}"),
        ("assistant", "<|ref|>cat<|/ref|><|det|>[[0, 0, 999, 500]]<|/det|>"),
    ]


@pytest.mark.parametrize(
    "turns",
    [
        partial(locate, PICTURE, SIZE, [Object("dog", ((0, 0, 700, 10),))]),
        partial(converse, [PICTURE], SIZE, "What?", [Object("dog", ((0, 0, 700, 10),))]),
    ],
)
def test_no_form_takes_a_box_that_leaves_the_image(turns):
    with pytest.raises(DataError, match="leaves the image"):
        turns()
