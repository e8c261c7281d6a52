"""Templates: how a conversation is written as one document.

What the user says is read, not learned; answers are learned, and so is the end-of-sequence token behind each of them.
Sources: conversation.py of the released DeepSeek-VL code; conversation.py and `format_messages_v2`
(processing_deepseek_vl_v2.py), which tokenises turn by turn, of DeepSeek-VL2's; "we only supervise answers and special
tokens and mask the system and user prompts" (DeepSeek-VL, section 3.2.3).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from megavl.data.document import Image, Segment, Text, Token
from megavl.data.errors import DataError


@dataclass(frozen=True)
class Turn:
    """What one side says: `role` is "system", "user" or "assistant"."""

    role: str
    segments: tuple[Segment, ...]


class Conversation(tuple[Segment, ...]):
    """Segments of a conversation, and the name of the template that wrote them."""

    template: str

    def __new__(cls, segments: Iterable[Segment], template: str) -> "Conversation":
        conversation = super().__new__(cls, segments)
        conversation.template = template
        return conversation


@dataclass(frozen=True)
class Template:
    """What stands around the turns of a conversation.

    name:       by which a command line and a dataset know it
    begin:      in front of everything
    system:     the prompt where a conversation brings none
    system_end: behind the system prompt
    separator:  behind each question
    user:       in front of a question
    assistant:  in front of an answer, up to where a model is made to write
    answer:     what it writes first; a space is here, as it is one token with the first word
    end:        whether end-of-sequence is behind each answer; behind the last it is also that of the document
    images:     whether a question's images alone are kept, without its words
    """

    name: str
    begin: tuple[Segment, ...] = ()
    system: str = ""
    system_end: str = ""
    separator: str = ""
    user: tuple[Segment, ...] = ()
    assistant: tuple[Segment, ...] = ()
    answer: str = ""
    end: bool = False
    images: bool = False

    def write(self, turns: Sequence[Turn]) -> Conversation:
        """Segments of a conversation: a system prompt or none, then questions and answers in turn.

        Raises:
            DataError: the turns do not alternate, the last is no answer, or one of them is empty.
        """
        segments = _read(*self.begin)
        system, talk = (turns[0], turns[1:]) if turns and turns[0].role == "system" else (None, turns)
        prompt = _stripped(system) if system else (Text(self.system),) if self.system else ()
        if prompt:
            segments += _read(*prompt, Text(self.system_end))
        for number, turn in enumerate(talk):
            due = ("user", "assistant")[number % 2]
            if turn.role != due:
                raise DataError(f"a turn of the {turn.role} is where one of the {due} is due; turns must alternate")
            segments += self._question(turn) if due == "user" else self._answer(turn)
        if len(talk) % 2 or not talk:
            raise DataError("the conversation does not end with an answer; there is nothing to learn, remove it")
        written = (segment for segment in segments if not isinstance(segment, Text) or segment.text)
        return Conversation(written, self.name)

    def _question(self, turn: Turn) -> list[Segment]:
        said = _stripped(turn)
        if self.images:
            said = tuple(segment for segment in said if isinstance(segment, Image))
            if not said:
                raise DataError("a question holds no image, and the template keeps nothing else of it")
        return _read(*self.user, *said, Text(self.separator), *self.assistant)

    def _answer(self, turn: Turn) -> list[Segment]:
        return [Text(self.answer), *_stripped(turn), *([Token()] if self.end else [])]


_TEMPLATES = (
    Template(
        name="vl",
        system="You are a helpful language and vision assistant. You are able to understand the visual content that "
        "the user provides, and assist the user with a variety of tasks using natural language.",
        system_end="\n\n",
        separator="\n\n",
        user=(Text("User: "),),
        assistant=(Text("Assistant:"),),
        answer=" ",
        end=True,
    ),
    Template(
        name="vl2",
        begin=(Token("<｜begin▁of▁sentence｜>"),),
        separator="\n\n",
        user=(Token("<|User|>"), Text(": ")),
        assistant=(Token("<|Assistant|>"), Text(":")),
        end=True,
    ),
    Template(name="plain"),
    Template(name="alignment", separator="\n", images=True),
)
TEMPLATES = {template.name: template for template in _TEMPLATES}
# Each is of the model family of its name; what the others write is read by both.
OF_A_FAMILY = ("vl", "vl2")


def _read(*segments: Segment) -> list[Segment]:
    """The segments as a prompt: read, not learned."""
    return [segment if isinstance(segment, Image) else replace(segment, supervised=False) for segment in segments]


def _stripped(turn: Turn) -> tuple[Segment, ...]:
    """Its segments without white space at both ends, as the released code strips every message."""
    first, *_ = segments = list(turn.segments)
    if isinstance(first, Text):
        segments[0] = replace(first, text=first.text.lstrip())
    if isinstance(segments[-1], Text):
        segments[-1] = replace(segments[-1], text=segments[-1].text.rstrip())
    segments = [segment for segment in segments if not isinstance(segment, Text) or segment.text]
    if not segments:
        raise DataError(f"a turn of the {turn.role} is empty; write what is said, or remove the conversation")
    return tuple(segments)
