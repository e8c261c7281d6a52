from functools import partial

import pytest

from megavl.data.document import Document, Image, Text, Token
from megavl.data.encode import encode
from megavl.data.errors import DataError
from megavl.data.template import TEMPLATES, Turn
from megavl.data.tokenizer import load_tokenizer
from tests.data import tokenizer_files

PICTURE = Image(b"bytes", "a.png")
SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
read = partial(Text, supervised=False)


def turns(*said) -> list[Turn]:
    return [
        Turn(("user", "assistant")[number % 2], segments if isinstance(segments, tuple) else (Text(segments),))
        for number, segments in enumerate(said)
    ]


def write(template: str, talk: list[Turn]):
    """Segments with neighbours of one kind joined, as encoding joins them."""
    joined = []
    for segment in TEMPLATES[template].write(talk):
        last = joined[-1] if joined else None
        if isinstance(segment, Text) and isinstance(last, Text) and last.supervised == segment.supervised:
            segment = Text(joined.pop().text + segment.text, segment.supervised)
        joined.append(segment)
    return joined


def test_vl_is_the_conversation_of_the_released_code():
    """Prompt and answers as `Conversation.get_prompt` of DeepSeek-VL writes them."""
    assert write("vl", turns((PICTURE, Text("What is it? ")), " A cat.\n", "Sure?", "Yes.")) == [
        read(f"{SYSTEM}\n\nUser: "),
        PICTURE,
        read("What is it?\n\nAssistant:"),
        Text(" A cat."),
        Token(),
        read("User: Sure?\n\nAssistant:"),
        Text(" Yes."),
        Token(),
    ]


BEGIN = Token("<｜begin▁of▁sentence｜>", False)


def test_vl2_is_the_conversation_of_the_released_code():
    """As `format_messages_v2` tokenises it: no system prompt, roles that are special tokens, no space before an
    answer."""
    assert write("vl2", turns((PICTURE, Text("\nWhat?")), " A cat.", "Sure?", "Yes.")) == [
        BEGIN,
        Token("<|User|>", False),
        read(": "),
        PICTURE,
        read("\nWhat?\n\n"),
        Token("<|Assistant|>", False),
        read(":"),
        Text("A cat."),
        Token(),
        Token("<|User|>", False),
        read(": Sure?\n\n"),
        Token("<|Assistant|>", False),
        read(":"),
        Text("Yes."),
        Token(),
    ]


def test_plain_adds_nothing():
    assert write("plain", turns("Write: ", (Text(" one"), PICTURE))) == [read("Write:"), Text("one"), PICTURE]


def test_alignment_keeps_the_images_of_a_question_and_a_line_break():
    talk = turns((Text("Describe it.\n"), PICTURE), "A cat.")
    assert write("alignment", talk) == [PICTURE, read("\n"), Text("A cat.")]


def test_a_system_prompt_of_its_own_takes_the_place_of_the_template_s():
    talk = [Turn("system", (Text("Be brief. "),)), *turns("Q", "A")]
    assert write("vl", talk) == [read("Be brief.\n\nUser: Q\n\nAssistant:"), Text(" A"), Token()]
    assert write("vl2", talk)[:3] == [BEGIN, read("Be brief."), Token("<|User|>", False)]


@pytest.mark.parametrize("template", TEMPLATES)
def test_every_answer_is_learned_and_nothing_else(template):
    talk = turns((PICTURE, Text("question")), "ANSWER", (PICTURE, Text("question")), (Text("ANSWER"), Token("<|ref|>")))
    written = TEMPLATES[template].write(talk)
    learned = "".join(s.text for s in written if isinstance(s, Text) and s.supervised)
    assert learned.split() == (["ANSWER", "ANSWER"] if " " in learned else ["ANSWERANSWER"])
    assert all(segment.text for segment in written if isinstance(segment, Text))
    assert [segment for segment in written if segment == Token()] == [Token()] * (2 if TEMPLATES[template].end else 0)
    assert Token("<|ref|>") in written[-2:]


def test_a_conversation_ends_with_one_end_of_sequence(tmp_path):
    tokenizer = load_tokenizer(str(tokenizer_files.write_sentencepiece(tmp_path / "t.model")))
    for template, ends in (("vl", 2), ("plain", 1)):
        segments = TEMPLATES[template].write(turns("question", "answer", "question", "answer"))
        (document,) = encode([Document("key", "file", segments)], tokenizer)
        assert [sequence.supervised for sequence in document.sequences] == [False, True, False, True]
        assert sum((sequence.tokens == tokenizer.eos).sum() for sequence in document.sequences) == ends
        assert document.sequences[-1].tokens[-1] == tokenizer.eos


@pytest.mark.parametrize(
    ("template", "talk", "message"),
    [
        ("vl", [], "does not end with an answer"),
        ("vl", [Turn("system", (Text("x"),))], "does not end with an answer"),
        ("vl", turns("Q"), "does not end with an answer"),
        ("vl", turns("Q", "A", "Q"), "does not end with an answer"),
        ("vl", turns("Q", "A")[::-1], "a turn of the assistant is where one of the user is due"),
        ("vl", turns("Q", "A")[:1] * 2, "a turn of the user is where one of the assistant is due"),
        (
            "vl",
            [*turns("Q", "A"), Turn("system", (Text("x"),))],
            "a turn of the system is where one of the user is due",
        ),
        ("vl", turns(" ", "A"), "a turn of the user is empty"),
        ("vl", turns("Q", "\n"), "a turn of the assistant is empty"),
        ("vl", [Turn("system", (Text(" "),)), *turns("Q", "A")], "a turn of the system is empty"),
        ("alignment", turns("Q", "A"), "a question holds no image"),
    ],
)
def test_conversations_that_cannot_be_written(template, talk, message):
    with pytest.raises(DataError, match=message):
        TEMPLATES[template].write(talk)
