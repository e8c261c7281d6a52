"""Datasets and a tokenizer for runs of the debug presets: texts of the standard library and drawn pictures."""

import json
import random
from pathlib import Path
from pydoc_data.topics import topics

from PIL import Image, ImageDraw
from train_tokenizer import train

from megavl.data.build import build

_CHARACTERS = 800
_TEXTS, _PICTURES = 300, 48
# Vocabulary sizes of the debug presets.
_VOCABULARY = {"vl": 2048, "vl2": 2400}
_COLOURS = ("red", "green", "blue", "orange", "black")


def write_data(folder: Path, family: str) -> list[str]:
    """Write a tokenizer, a text and a multimodal dataset; the overrides with which a run reads them."""
    folder.mkdir(parents=True, exist_ok=True)
    sources = {"text": _texts(), "multimodal": _pictures(folder)}
    for name, records in sources.items():
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    tokenizer = folder / "tokenizer.model"
    train([str(folder / "text.jsonl")], tokenizer, _VOCABULARY[family], family)
    for name in sources:
        build([str(folder / f"{name}.jsonl")], str(folder / name), str(tokenizer), overwrite=True)
    return [
        f"data.tokenizer={tokenizer}",
        *(f'data.{name}=[{{"prefix": "{folder / name}"}}]' for name in sources),
    ]


def _texts() -> list[dict]:
    text = "\n\n".join(topics[name] for name in sorted(topics))
    starts = range(0, len(text) - _CHARACTERS, _CHARACTERS)
    return [{"id": start, "text": text[start : start + _CHARACTERS]} for start in list(starts)[:_TEXTS]]


def _pictures(folder: Path) -> list[dict]:
    """Records of a rectangle on white, with its colour and position as the caption."""
    draw, records = random.Random(0), []
    for number in range(_PICTURES):
        colour, left, top = draw.choice(_COLOURS), draw.randrange(60), draw.randrange(60)
        picture = Image.new("RGB", (draw.randrange(64, 160), draw.randrange(64, 160)), "white")
        ImageDraw.Draw(picture).rectangle((left, top, left + 50, top + 50), colour)
        picture.save(folder / f"{number}.png")
        caption = f"A {colour} rectangle at {left}, {top}.\n"
        records.append({"id": number, "segments": [{"image": f"{number}.png"}, {"text": caption}]})
    return records
