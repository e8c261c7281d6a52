"""Image files like photographs: smooth shapes under a little noise, as JPEG."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

# Sides of what cameras and the web give, in pixels.
_SIZES = ((640, 480), (800, 600), (1024, 683), (1280, 960), (600, 900))
# So many are drawn; the rest are copies of them under other names.
_DRAWN = 40


def write_pictures(directory: Path, number: int) -> list[Path]:
    """Files of 60 to 300 kB."""
    directory.mkdir(parents=True, exist_ok=True)
    paths = [directory / f"{index:06}.jpg" for index in range(number)]
    for index, path in enumerate(paths[:_DRAWN]):
        _draw(index, _SIZES[index % len(_SIZES)]).save(path, quality=88)
    for index, path in enumerate(paths[_DRAWN:]):
        path.write_bytes(paths[index % _DRAWN].read_bytes())
    return paths


def write_captions(path: Path, pictures: list[Path], caption: str) -> Path:
    """A .jsonl of one document for each picture: the image, then the caption."""
    with path.open("w", encoding="utf-8") as file:
        for picture in pictures:
            segments = [{"image": str(picture.relative_to(path.parent))}, {"text": caption}]
            print(json.dumps({"segments": segments}), file=file)
    return path


def _draw(seed: int, size: tuple[int, int]) -> Image.Image:
    draw = np.random.default_rng(seed)
    width, height = size
    coarse = Image.fromarray(draw.integers(0, 256, (height // 40, width // 40, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize(size, Image.Resampling.BICUBIC), dtype=np.float32)
    noise = draw.normal(0, 6, (height, width, 1))
    return Image.fromarray((smooth + noise).clip(0, 255).astype(np.uint8))
