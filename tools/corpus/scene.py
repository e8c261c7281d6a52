"""Grounding: coloured shapes on a canvas, with the box of each known from its drawing.

Canvases are of many sizes and aspect ratios, so that small tiles cut them in many ways.
"""

import random
from dataclasses import dataclass

from PIL import Image, ImageDraw

COLOURS = {
    "red": (214, 39, 40),
    "green": (44, 160, 44),
    "blue": (31, 79, 190),
    "yellow": (240, 200, 20),
    "purple": (140, 60, 170),
    "black": (20, 20, 20),
}
SHAPES = ("circle", "square", "triangle")
GROUNDS = ((255, 255, 255), (225, 232, 238), (250, 240, 222))

# A mark's own colour is no shape's.
_MARK = (255, 0, 255)
# Sides are as often in each of the two octaves.
_LEAST_SIDE_PX, _OCTAVES = 26, 2
_SHAPE_PX = (8, 18)
_MOST_SHAPES = 4
# Of as many documents of each form as the others: the first is what the others build on.
_FORMS = {"locate": 7, "describe": 2, "alike": 1}

Box = list[int]


@dataclass(frozen=True)
class Shape:
    """One shape of a scene; `box` is [left, top, right, bottom] in pixels, of which right and bottom are outside."""

    colour: str
    kind: str
    box: Box

    @property
    def name(self) -> str:
        return f"{self.colour} {self.kind}"


@dataclass(frozen=True)
class Scene:
    """An image, RGB, and the shapes on it, which do not touch."""

    image: Image.Image
    shapes: tuple[Shape, ...]

    def boxes(self, name: str) -> list[Box]:
        """Of all shapes of that name."""
        return [shape.box for shape in self.shapes if shape.name == name]

    def names(self) -> list[str]:
        """Each once, in the order of drawing."""
        return list(dict.fromkeys(shape.name for shape in self.shapes))


def draw_scene(rng: random.Random, wanted: str | None = None) -> Scene:
    """A scene of one to four shapes; the first is `wanted`, if given."""
    width, height = (round(_LEAST_SIDE_PX * 2 ** (_OCTAVES * rng.random())) for _ in range(2))
    image = Image.new("RGB", (width, height), rng.choice(GROUNDS))
    draw = ImageDraw.Draw(image)
    shapes: list[Shape] = []
    for number in range(rng.randint(1, _MOST_SHAPES)):
        side = rng.randint(*_SHAPE_PX)
        left, top = rng.randint(1, width - side - 1), rng.randint(1, height - side - 1)
        box = [left, top, left + side, top + side]
        name = wanted if wanted and not number else f"{rng.choice([*COLOURS])} {rng.choice(SHAPES)}"
        if all(_apart(box, other.box) for other in shapes):
            shape = Shape(*name.split(), box)
            _draw(draw, shape)
            shapes.append(shape)
    return Scene(image, tuple(shapes))


def _apart(box: Box, other: Box) -> bool:
    """With a pixel of the ground between them at least."""
    return box[2] < other[0] or other[2] < box[0] or box[3] < other[1] or other[3] < box[1]


def _draw(draw: ImageDraw.ImageDraw, shape: Shape) -> None:
    left, top, right, bottom = shape.box
    # Pillow's corners are inside what it draws.
    right, bottom, colour = right - 1, bottom - 1, COLOURS[shape.colour]
    match shape.kind:
        case "circle":
            draw.ellipse((left, top, right, bottom), colour)
        case "square":
            draw.rectangle((left, top, right, bottom), colour)
        case "triangle":
            draw.polygon(((left, bottom), (right, bottom), ((left + right) // 2, top)), colour)


def record(rng: random.Random) -> tuple[list[Image.Image], dict]:
    """The images of a document, and the rest of its record in the layout `grounding`."""
    form = rng.choices([*_FORMS], [*_FORMS.values()])[0]
    return {"locate": _locate, "describe": _describe, "alike": _alike}[form](rng)


def _locate(rng: random.Random) -> tuple[list[Image.Image], dict]:
    """Where are the shapes of one name, and in one scene of four also those of a name that is not there?"""
    scene = draw_scene(rng)
    queries = [rng.choice(scene.names())]
    if rng.random() < 0.25:
        absent = [f"{colour} {kind}" for colour in COLOURS for kind in SHAPES if not scene.boxes(f"{colour} {kind}")]
        queries.insert(rng.randint(0, 1), rng.choice(absent))
    return [scene.image], {"grounding": [{"query": query, "boxes": scene.boxes(query)} for query in queries]}


def _describe(rng: random.Random) -> tuple[list[Image.Image], dict]:
    """All shapes, in words."""
    scene = draw_scene(rng)
    answer: list[dict] = []
    for name in scene.names():
        boxes = scene.boxes(name)
        many = ("A ", "Two ", "Three ", "Four ")[len(boxes) - 1]
        answer += [{"text": many if not answer else f" and {many.lower()}"}]
        answer += [{"query": name + "s" * (len(boxes) > 1), "boxes": boxes}]
    question = "Can you describe the content of the image?"
    return [scene.image], {"question": question, "grounding": [*answer, {"text": "."}]}


def _alike(rng: random.Random) -> tuple[list[Image.Image], dict]:
    """A shape is marked in a first scene; where is one like it in the second?"""
    example = draw_scene(rng)
    marked = example.shapes[0]
    left, top, right, bottom = marked.box
    ImageDraw.Draw(example.image).rectangle((left - 1, top - 1, right, bottom), outline=_MARK)
    scene = draw_scene(rng, marked.name)
    question = (
        "The first image shows an object within the pink bounding box. Please identify the object of the same category "
        "in the second image."
    )
    found = {"query": marked.name, "boxes": scene.boxes(marked.name)}
    return [example.image, scene.image], {"question": question, "grounding": [found]}
