"""A directory of safetensors files with an index, as the Hugging Face hub has them."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megavl.checkpoint.error import CheckpointError, some

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


@dataclass(frozen=True)
class Piece:
    """Tensors that are made, and so written, together. `make` returns them by name."""

    names: tuple[str, ...]
    size_bytes: int
    make: Callable[[], dict[str, Tensor]]


def write_shards(directory: Path, pieces: list[Piece], max_bytes: int, report: Callable[[str], None]) -> None:
    """Write pieces in their order into files of at most `max_bytes` each, unless one piece alone is larger.

    The tensors of one file are in memory at a time.
    """
    shards: list[list[Piece]] = [[]]
    for piece in pieces:
        if shards[-1] and sum(other.size_bytes for other in shards[-1]) + piece.size_bytes > max_bytes:
            shards.append([])
        shards[-1].append(piece)
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        name = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {key: tensor.contiguous() for piece in shard for key, tensor in piece.make().items()}
        save_file(tensors, directory / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
        report(f"{name}: {len(tensors)} tensors, {sum(piece.size_bytes for piece in shard) / 1e9:.2f} GB")
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(piece.size_bytes for piece in pieces)}, "weight_map": weight_map}
        (directory / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")


class Shards:
    """The tensors in a directory of safetensors files, read one at a time.

    shapes, dtypes: by name

    Raises:
        CheckpointError: there are no such files, or they are incomplete.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self._file_of = self._index()
        for name in dict.fromkeys(self._file_of.values()):
            self._scan(name)
        absent = [key for key in self._file_of if key not in self.shapes]
        if absent:
            raise CheckpointError(f"{directory / INDEX} names tensors that its files do not hold: {some(absent)}")

    def read(self, name: str) -> Tensor:
        """One tensor on the CPU."""
        with safe_open(self.directory / self._file_of[name], "pt") as file:
            return file.get_tensor(name)

    def _index(self) -> dict[str, str]:
        """Tensor -> file."""
        if (self.directory / INDEX).is_file():
            return json.loads((self.directory / INDEX).read_text(encoding="utf-8"))["weight_map"]
        if not (self.directory / SINGLE).is_file():
            raise CheckpointError(
                f"{self.directory} has neither {INDEX} nor {SINGLE}: only safetensors checkpoints are read. Convert "
                "pytorch_model.bin files with transformers' save_pretrained first"
            )
        with self._open(SINGLE) as file:
            return dict.fromkeys(file.keys(), SINGLE)

    def _scan(self, name: str) -> None:
        with self._open(name) as file:
            for key in file.keys():  # noqa: SIM118  not a dict
                part = file.get_slice(key)
                self.shapes[key] = tuple(part.get_shape())
                self.dtypes[key] = _DTYPES.get(part.get_dtype(), torch.uint8)

    def _open(self, name: str):
        try:
            return safe_open(self.directory / name, "pt")
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self.directory / name} cannot be read: {error}") from error


_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
