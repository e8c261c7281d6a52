"""How many tiles and tokens an image takes, and in which order its features stand, from its size alone.

Source: `select_best_resolution` and `tokenize_with_images` (processing_deepseek_vl_v2.py) and `prepare_inputs_embeds`
(modeling_deepseek_vl_v2.py) of the released DeepSeek-VL2 code. DeepSeek-VL2 section 3 describes another rule of
selection (least padding); the released models were trained with the code's: the most pixels of the image that are kept.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megavl.config.model import ModelConfig

# In a layout, what stands where no feature does.
NEWLINE, SEPARATOR = -1, -2


@dataclass(frozen=True, order=True)
class Grid:
    """Local tiles of an image, besides its overview. DeepSeek-VL has the overview alone: no row and no column."""

    rows: int
    columns: int

    @property
    def tiles(self) -> int:
        """Overview included."""
        return 1 + self.rows * self.columns


class Tiling:
    """The grids that images of a model can have.

    grids:  in the order of the released candidates; the first is that of an image which is not tiled
    tokens: int64 [grids], decoder positions of an image with each
    tiles:  int64 [grids], overview included
    """

    def __init__(self, model: ModelConfig) -> None:
        self._size, self._side, self._tiling = model.siglip.image_size, model.feature_grid, model.tiling
        self._placeholder = model.image_token_id
        self.grids = (Grid(0, 0),) if self._tiling is None else _candidates(self._tiling.max_tiles)
        self._layouts = {grid: self.layout(grid) for grid in self.grids}
        self.tiles = np.array([grid.tiles for grid in self.grids])
        self.tokens = np.array([len(layout) for layout in self._layouts.values()])

    @property
    def facts(self) -> dict[str, Any]:
        """All that tokens and tiles of an image depend on, in JSON types."""
        if self._tiling is None:
            return {"tokens": self.tokens.tolist()}
        return self._tiling.model_dump() | {"side": self._side, "size": self._size}

    def choose(self, widths: np.ndarray, heights: np.ndarray, images: np.ndarray) -> np.ndarray:
        """Index of the grid of each image: uint8 [N].

        widths, heights: in pixels, int [N]
        images:          how many the document of each has, int [N]
        """
        best = np.zeros(len(widths), dtype=np.uint8)
        if self._tiling is None:
            return best
        pixels = widths.astype(np.int64) * heights
        most, least_waste = np.zeros(len(widths), dtype=np.int64), np.full(len(widths), np.iinfo(np.int64).max)
        for index, grid in enumerate(self.grids):
            room_width, room_height = grid.columns * self._size, grid.rows * self._size
            scale = np.minimum(room_width / widths, room_height / heights)
            kept = np.minimum((widths * scale).astype(np.int64) * (heights * scale).astype(np.int64), pixels)
            waste = room_width * room_height - kept
            better = (kept > most) | ((kept == most) & (waste < least_waste))
            best[better], most[better], least_waste[better] = index, kept[better], waste[better]
        best[images > self._tiling.max_images] = 0
        return best

    def grid(self, width: int, height: int, images: int) -> Grid:
        """The grid of one image."""
        return self.grids[self.choose(np.array([width]), np.array([height]), np.array([images]))[0]]

    def layout(self, grid: Grid) -> np.ndarray:
        """What stands at each position of an image: int64 [tokens], the index of a feature among those of all its tiles
        (the overview first, then the local ones row by row), NEWLINE or SEPARATOR.

        With tiling: the overview with a newline behind each row, a separator, then the rows of features of the whole
        grid, across its tiles, with a newline behind each.
        """
        side = self._side
        features = np.arange(grid.tiles * side**2)
        overview, local = features[: side**2].reshape(side, side), features[side**2 :]
        if self._tiling is None:
            return overview.flatten()
        stitched = (
            local.reshape(grid.rows, grid.columns, side, side)
            .transpose(0, 2, 1, 3)  # [rows, side, columns, side]
            .reshape(grid.rows * side, grid.columns * side)
        )
        return np.concatenate((_lines(overview), [SEPARATOR], _lines(stitched)))

    def places(self, tokens: np.ndarray, grids: Sequence[Grid]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Indices of image features, newlines and separators into the tokens.

        Args:
            tokens: int64 [T]
            grids: of the images, in the order of their placeholders

        Returns:
            int64 [tiles * tile_features] in the order of the tiles, int64 [newlines], int64 [separators].

        Raises:
            ValueError: the number of placeholders is not what the grids take.
        """
        slots = np.flatnonzero(tokens == self._placeholder)  # [placeholders]
        expected = sum(len(self._layouts[grid]) for grid in grids)
        if len(slots) != expected:
            raise ValueError(
                f"{len(slots)} placeholder tokens (id {self._placeholder}) for {len(grids)} images that take "
                f"{expected}: features would land on the wrong tokens. Every image needs its own run of placeholders, "
                "and no text may hold their id."
            )
        features, newlines, separators = [], [], []
        for grid in grids:
            layout = self._layouts[grid]
            run, slots = slots[: len(layout)], slots[len(layout) :]  # [tokens of the image], [rest]
            places = np.empty(grid.tiles * self._side**2, dtype=np.int64)
            places[layout[layout >= 0]] = run[layout >= 0]
            features.append(places)
            newlines.append(run[layout == NEWLINE])
            separators.append(run[layout == SEPARATOR])
        nothing = np.empty(0, dtype=np.int64)  # np.concatenate refuses an empty list
        return tuple(np.concatenate([nothing, *parts]) for parts in (features, newlines, separators))


def _lines(features: np.ndarray) -> np.ndarray:
    """[rows, columns] -> [rows * (columns + 1)], a newline behind each row."""
    return np.pad(features, ((0, 0), (0, 1)), constant_values=NEWLINE).flatten()


def _candidates(max_tiles: int) -> tuple[Grid, ...]:
    """All grids of at most so many tiles, in the order of the released config.json: by tiles, long ones before square
    ones, tall ones before wide ones."""
    grids = [Grid(rows, columns) for rows in range(1, max_tiles + 1) for columns in range(1, max_tiles // rows + 1)]
    return tuple(sorted(grids, key=lambda grid: (grid.tiles, min(grid.rows, grid.columns), grid.columns)))
