"""How full a run's packs are, what they cut, and how fast they are found.

    python tools/measure_packing.py --config launch/recipes/quickstart.yaml --seq-len 192 1024 4096
    python tools/measure_packing.py --made-up obelics captions --model vl2_tiny --seq-len 4096 --max-tiles 14

measures the blend of a recipe's text and multimodal sources, or of made-up ones. Beside it stands what laying the
documents end to end and cutting at every pack would do. Only lengths and the sizes of images are read. The result is a
table in Markdown.
"""

import argparse
import sys
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from megavl.config.data_rules import image_problems
from megavl.config.error import ConfigError
from megavl.config.load import load_run
from megavl.config.presets import PRESETS
from megavl.config.tiles import Tiling
from megavl.data.concatenation import cuts
from megavl.data.errors import DataError
from megavl.data.format import IMAGE, TEXT
from megavl.data.store import Store
from megavl.data.stream import Stream

# Documents at most of each source that are looked at for cuts.
DOCUMENTS = 200_000


class MadeUp:
    """Documents of which only the lengths and the sizes of images exist: images spread among texts of lognormal length,
    with the means that a dataset's paper gives."""

    def __init__(self, name: str, mean_tokens: float, mean_images: float) -> None:
        random, number = np.random.default_rng(0), 50_000
        images = random.poisson(mean_images, number) if mean_images > 1 else np.full(number, int(mean_images))
        segments = np.maximum(1, 2 * images)  # each image and a text behind it
        self.documents = np.concatenate(([0], np.cumsum(segments)))
        place = np.arange(self.documents[-1]) - np.repeat(self.documents[:-1], segments)
        self.modes = np.where((np.repeat(images, segments) > 0) & (place % 2 == 0), IMAGE, TEXT).astype(np.int8)
        texts = np.repeat(np.maximum(1, images), segments)
        # The texts of a document share one lognormal length; sigma 1 is about that of web text.
        whole = random.lognormal(np.log(mean_tokens) - 0.5, 1.0, number)
        self.lengths = np.maximum(2, np.repeat(whole, segments) / texts).astype(np.int32)
        self.prefix, self.meta = name, SimpleNamespace(idx_sha256=name)
        borders = np.concatenate(([0], np.cumsum(images)))
        sides = pa.StructArray.from_arrays(_sides(random, int(borders[-1])), ["width", "height"])
        self._rows = pa.ListArray.from_arrays(pa.array(borders, pa.int32()), sides)

    def __len__(self) -> int:
        return len(self.documents) - 1

    def spans(self, documents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self.documents[documents], self.documents[documents + 1]

    def batches(self) -> Iterator[pa.RecordBatch]:
        yield pa.record_batch({"images": self._rows})


def _sides(random: np.random.Generator, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Widths and heights as images of the web have them: an area of about 640 x 480 pixels, most of them landscapes,
    and OBELICS' limits (no side below 150 pixels, none more than twice the other)."""
    area = random.lognormal(np.log(640 * 480), 1.2, number)
    ratio = np.exp(np.clip(random.normal(np.log(1.2), 0.35, number), -np.log(2), np.log(2)))
    return tuple(np.maximum(150, side).astype(np.int32) for side in (np.sqrt(area * ratio), np.sqrt(area / ratio)))


# Tokens of text and images of a document on average. C4: 156 B tokens, 365 M documents (arXiv 1910.10683, 2104.08758);
# OBELICS: 115 B, 353 M images, 141 M documents (arXiv 2306.16527); MMC4: 43 B, 571 M, 101 M (arXiv 2304.06939);
# CapsFusion: 23 words (arXiv 2310.20550).
MADE_UP = {"c4": (427, 0), "obelics": (816, 2.5), "mmc4": (425, 5.65), "captions": (30, 1)}


class Blend(NamedTuple):
    """Sources of one modality."""

    name: str
    stores: tuple[Store | MadeUp, ...]
    weights: tuple[float, ...]

    @property
    def has_images(self) -> bool:
        return any((store.modes == IMAGE).any() for store in self.stores)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--config", metavar="RECIPE.yaml", help="measure the blends of a recipe")
    source.add_argument("--made-up", nargs="+", choices=MADE_UP, help="measure a blend of these, with equal weights")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="of the recipe")
    parser.add_argument("--seq-len", type=int, nargs="+", help="tokens of a pack (default: the recipe's, or 4096)")
    parser.add_argument(
        "--model", default="vl_7b", choices=PRESETS, help="with --made-up: the model, whose images take room (vl_7b)"
    )
    parser.add_argument("--max-tiles", type=int, help="tiles of a pack at most (default: the recipe's, or no budget)")
    parser.add_argument("--packs", type=int, default=10_000, help="packs to look at (default 10000)")
    return parser.parse_intermixed_args()


def measure(blend: Blend, seq_len: int, tiling: Tiling, max_tiles: int | None, packs: int) -> str:
    """A row of the table."""
    stream = Stream(blend.stores, blend.weights, seq_len, tiling, (0,), max_tiles)
    started = time.perf_counter()
    tokens = images = tiles = most_tiles = 0
    for first in range(0, packs, 100):
        for pack in stream.packs(first, min(first + 100, packs)):
            tokens += sum(piece.tokens for piece in pack)
            images += sum(piece.images for piece in pack)
            tiles += (held := sum(piece.tiles for piece in pack))
            most_tiles = max(most_tiles, held)
    elapsed_s = time.perf_counter() - started
    documents = long = images_seen = cut_documents = cut_images = 0
    for source, store in zip(stream.sources, blend.stores, strict=True):
        number = min(len(store), DOCUMENTS)
        draws = source.draws(0, number)
        documents += number
        long += int(((draws["tokens"] > seq_len) | (draws["tiles"] > (max_tiles or seq_len))).sum())
        images_seen += int(draws["images"].sum())
        found = cuts(source, number, seq_len)
        cut_documents, cut_images = cut_documents + found[0], cut_images + found[1]
    return (
        f"| {blend.name} | {seq_len} | {tokens / (packs * seq_len):.2%} | {tiles / max(1, images):.1f} | "
        f"{tiles / packs:.1f} | {most_tiles} | {packs / elapsed_s:,.0f} | "
        f"{long / documents:.1%} | {cut_documents / documents:.1%} | {cut_images / max(1, images_seen):.1%} |"
    )


def check_images(blends: list[Blend], tiling: Tiling, seq_lens: list[int], max_tiles: int | None) -> None:
    """Raise DataError where an image would not fit a pack, whose figures would be those of images that are split."""
    if not any(blend.has_images for blend in blends):
        return
    if problems := [problem for seq_len in seq_lens for problem in image_problems(tiling, seq_len, max_tiles)]:
        raise DataError("\n".join(dict.fromkeys(problems)))


def main() -> None:
    args = arguments()
    try:
        if args.config:
            config = load_run(args.config, args.overrides)
            model, data = config.model, config.data
            blends = [
                Blend(kind, tuple(Store(one.prefix) for one in sources), tuple(one.weight for one in sources))
                for kind, sources in (("text", data.text), ("multimodal", data.multimodal))
                if sources
            ]
            seq_len, max_tiles = data.seq_len, data.max_tiles
        else:
            stores = tuple(MadeUp(name, *MADE_UP[name]) for name in args.made_up)
            blends = [Blend(" + ".join(args.made_up), stores, (1.0,) * len(stores))]
            model, seq_len, max_tiles = PRESETS[args.model], 4096, None
        tiling, seq_lens, max_tiles = Tiling(model), args.seq_len or [seq_len], args.max_tiles or max_tiles
        check_images(blends, tiling, seq_lens, max_tiles)
    except (ConfigError, DataError) as error:
        sys.exit(f"error: {error}")
    print(
        "| blend | seq_len | filled | tiles of an image | of a pack | at most | packs/s | cut | laid end to end: cut | "
        "images cut |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for blend in blends:
        for seq_len in seq_lens:
            print(measure(blend, seq_len, tiling, max_tiles, args.packs), flush=True)


if __name__ == "__main__":
    main()
