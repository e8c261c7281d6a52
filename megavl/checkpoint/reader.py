"""An opened checkpoint: what it holds, and reading boxes of it. One process on its own; nothing here is collective."""

from dataclasses import replace
from math import prod
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megavl.checkpoint.error import CheckpointError, some
from megavl.checkpoint.fragments import Boxes
from megavl.checkpoint.layout import read_state, verify_files
from megavl.config.model import ModelConfig

# They say how a model is called, made or bounded, not what its weights compute.
_FREE_FIELDS = {"name", "init_std", "decoder.max_positions"}

OTHER_PARAMETERS = (
    "to train other parameters than the checkpoint's run did, start a new run from its weights (checkpoint.init_from)"
)


class Checkpoint:
    """A checkpoint whose files are all there at full size.

    state:   what `read_state` returns
    tensors: key -> {"shape": [...], "dtype": "float32"}

    Raises:
        CheckpointError: it is incomplete or damaged.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.state = read_state(path)
        self.tensors: dict[str, dict] = self.state["tensors"]
        verify_files(path, self.state["files"])
        self._reader = FileSystemReader(path)
        try:
            self._metadata = self._reader.read_metadata()
        except Exception as error:  # whatever a damaged pickle raises
            raise CheckpointError(
                f"the index of checkpoint {path} cannot be read ({error}): use another one"
            ) from error
        self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)

    def dtype(self, key: str) -> torch.dtype:
        """Dtype in which a tensor was saved."""
        return getattr(torch, self.tensors[key]["dtype"])

    def source(self, key: str, dtype: torch.dtype) -> str:
        """The tensor from which `key` is read when it is wanted in `dtype`.

        A parameter and its master are twins of which the fp32 one is the authority: an fp32 parameter is read from
        the master where the saved parameter is narrower, a master that was not saved from the parameter.
        """
        kind, name = key.split(".", 1)
        param, master = f"param.{name}", f"master.{name}"
        if kind == "master" and master not in self.tensors:
            return param
        twins = param in self.tensors and master in self.tensors
        if kind == "param" and twins and dtype == torch.float32 != self.dtype(param):
            return master
        return key

    def check_model(self, model: ModelConfig) -> None:
        """Refuse a checkpoint of a model whose weights compute something else.

        Raises:
            CheckpointError: with the fields that differ.
        """
        saved, asked = _flat(self.state["config"]["model"]), _flat(model.model_dump(mode="json"))
        fields = sorted(name for name in {*saved, *asked} - _FREE_FIELDS if saved.get(name) != asked.get(name))
        if fields:
            differing = "; ".join(f"{name}: {saved.get(name)} there, {asked.get(name)} here" for name in fields)
            raise CheckpointError(
                f"checkpoint {self.path} is of another model ({differing}). Nothing was loaded; use the model that "
                "it was trained with, another checkpoint, or for a new run another output_dir"
            )

    def plan(self, boxes: dict[str, Boxes]) -> list[ReadItem]:
        """What to read, from where, to fill `boxes`; reads nothing yet.

        Raises:
            CheckpointError: the checkpoint lacks tensors, or has them in another shape.
        """
        sources = {key: self.source(key, held.dtype) for key, held in boxes.items()}
        missing = [key for key in boxes if sources[key] not in self.tensors]
        if missing:
            raise CheckpointError(
                f"checkpoint {self.path} lacks {some(missing)}, which this run needs. Nothing was loaded; "
                f"{OTHER_PARAMETERS}"
            )
        shapes = {key: self.tensors[sources[key]]["shape"] for key in boxes}
        wrong = [
            f"{key} ({shapes[key]} there, {list(held.full_shape)} here)"
            for key, held in boxes.items()
            if shapes[key] != list(held.full_shape)
        ]
        if wrong:
            raise CheckpointError(f"checkpoint {self.path} has other shapes: {some(wrong)}. Nothing was loaded")
        return [item for key, held in boxes.items() for item in self._read_items(key, sources[key], held)]

    def read(self, boxes: dict[str, Boxes], items: list[ReadItem]) -> None:
        """Carry out a plan, converting dtypes where they differ.

        Raises:
            CheckpointError: the files cannot be read; some values may have changed.
        """
        try:
            self._reader.read_data(LoadPlan(items), _Planner(boxes)).wait()
        except (OSError, RuntimeError) as error:
            raise CheckpointError(f"reading checkpoint {self.path} failed: {error}") from error

    def read_tensor(self, key: str, dtype: torch.dtype) -> Tensor:
        """One full tensor on the CPU."""
        full = torch.empty(self.tensors[key]["shape"], dtype=dtype)
        held = {key: Boxes.of(full)}
        self.read(held, self.plan(held))
        return full

    def _read_items(self, key: str, source: str, held: Boxes) -> list[ReadItem]:
        """What to read for the boxes of one tensor."""
        chunks = held.__create_chunk_list__()
        items = create_read_items_for_chunk_list(key, self._metadata.state_dict_metadata[source], chunks)
        found, wanted = sum(prod(item.lengths) for item in items), sum(prod(chunk.sizes) for chunk in chunks)
        if found != wanted:
            raise CheckpointError(f"checkpoint {self.path} holds {found} of {wanted} elements wanted of {source}")
        return [replace(item, storage_index=replace(item.storage_index, fqn=source)) for item in items]


class _Planner(DefaultLoadPlanner):
    """Gives DCP's reader the box that a read item fills; the plan itself is made by `Checkpoint`."""

    def __init__(self, boxes: dict[str, Boxes]):
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.boxes = boxes

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self.boxes[index.fqn].__get_tensor_shard__(index)


def _flat(fields: dict, prefix: str = "") -> dict:
    """Nested fields under dotted names; a section that is absent is one field of value None."""
    flat = {}
    for name, value in fields.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat
