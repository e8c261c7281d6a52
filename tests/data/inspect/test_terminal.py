"""What a terminal shows."""

import io

import pytest
from rich.console import Console

from megavl.config.tiles import Tiling
from megavl.data.inspect import terminal
from megavl.data.inspect.sample import read
from megavl.data.inspect.statistics import count


def lines(renderable, colours=False) -> list[str]:
    out = io.StringIO()
    Console(file=out, width=100, force_terminal=colours).print(renderable)
    return [line.rstrip() for line in out.getvalue().splitlines()]


def show(gallery, document, borders, colours=False, tokenizer=True) -> list[str]:
    special = {token: name for name, token in gallery.tokenizer.special.items()}
    found = read(gallery.store, document, gallery.tokenizer if tokenizer else None, 1000)
    return lines(terminal.sample(found, special, borders), colours)


def test_a_dialogue_reads_as_one(gallery):
    image = len(gallery.store.image(gallery.store.sequences(1)[1]))
    prompt, answer = (int(gallery.store.lengths[gallery.store.sequences(1)[place]]) for place in (0, 2))
    title, *rest = show(gallery, 1, borders=False)
    assert title.startswith("beetle (document 1 of ")
    assert rest == [
        f"[prompt {prompt} tokens]",
        "What is this?",
        "",
        f"[image 60x30 PNG {image:,} bytes]",
        f"[text {answer} tokens]",
        "Ein Käfer, 甲虫, a 🪲.",
        "  indented      text �</s>",
    ]


def test_an_image_is_shown_as_the_model_takes_it(gallery, model, tiled_model):
    """60 x 30 pixels fit 2 x 1 tiles of 32: 6 + 1 tokens, and 2 rows of 4 and a newline."""
    for one, taken in ((model, "16 tokens"), (tiled_model, "2 x 1 tiles, 17 tokens")):
        found = read(gallery.store, 1, gallery.tokenizer, 1000, Tiling(one))
        size_bytes = len(gallery.store.image(gallery.store.sequences(1)[1]))
        assert f"[image 60x30 PNG {size_bytes:,} bytes, {taken}]" in lines(terminal.sample(found, {}, False))


def test_borders_stand_between_tokens(gallery):
    shown = "\n".join(show(gallery, 1, borders=True))
    ids = [
        token
        for sequence in gallery.store.sequences(1)[::2]
        for token in gallery.store.text(sequence, 0, int(gallery.store.lengths[sequence])).tolist()
    ]
    assert shown.count("│") == len(ids) and shown.count("↵") == 2


def test_a_document_cannot_control_the_terminal():
    assert terminal.printable("a\x1b[2Jb\x07\x9b\r\n\tc", keep="\n\t") == "a\\x1b[2Jb\\x07\\x9b\\x0d\n\tc"
    assert terminal.printable("k\ny") == "k\\x0ay"


def test_markup_in_a_document_is_text(gallery):
    assert any("<img src=x onerror=alert(1)>" in line for line in show(gallery, 0, borders=False))
    assert lines(terminal.interval(4, 7)) == ["4–7"] and terminal.interval(1, 1) == "1"


@pytest.mark.parametrize("number", [1, 2])
def test_the_summary_has_every_count(gallery, number):
    found = count(gallery.store, lambda _: None)
    shown = "\n".join(lines(terminal.summary([found] * number)))
    assert shown.count(f"{found.tokens:,}") >= number and "pages.jsonl" in shown and "images per document" in shown
    assert ("2 datasets together" in shown) == (number == 2)
    assert (f"{2 * found.tokens:,}" in shown) == (number == 2)
    assert "tiles" not in shown


def test_tiles_are_in_the_summary(gallery, tiled_model):
    found = count(gallery.store, lambda _: None, Tiling(tiled_model))
    shown = "\n".join(lines(terminal.summary([found])))
    assert f"{found.tiles:,}" in shown and f"{found.model_tokens:,}" in shown
    assert "tiles per image, overview included" in shown and "images tiles" in " ".join(shown.split())
