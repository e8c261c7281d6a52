"""Writing a checkpoint: every rank its boxes, rank 0 the manifest and, last of all, the name."""

import json
import os
import platform
import shutil
import warnings
from collections.abc import Iterable, Iterator
from functools import partial
from math import prod
from pathlib import Path
from queue import Queue

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException, Metadata
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, WriteItem
from torch.futures import Future

from megavl import __version__
from megavl.checkpoint import layout
from megavl.checkpoint.error import CheckpointError, some
from megavl.checkpoint.fragments import Boxes, Fragment, by_key
from megavl.checkpoint.versions import RecordingWriter
from megavl.parallel.agree import is_first, on_every_rank, on_first_rank

_FILE_BYTES = 1 << 28


def save(
    directory: str | Path,
    step: int,
    fragments: Iterable[Fragment],
    state: dict,
    keep: int,
    control: dist.ProcessGroup | None,
) -> Path:
    """Write `directory`/step_<step>; then remove all but the newest `keep` checkpoints. Collective.

    fragments: what this rank holds. A box that several ranks hold is written by one of them.
    state:     JSON values; at least "config", with the model's shapes under "model". "step", "versions" and the
               manifest are added here.
    control:   gloo group over the world (`Mesh.control`); None for a process without process groups

    The directory has its final name only when every byte of it is on disk.

    Raises:
        CheckpointError: on all ranks, when any of them failed; no checkpoint of this step is there then.
    """
    boxes = on_every_rank(lambda: by_key(fragments), control, CheckpointError)
    return save_boxes(directory, step, boxes, state, keep, control)


def save_boxes(
    directory: str | Path,
    step: int,
    boxes: dict[str, Boxes],
    state: dict,
    keep: int | None,
    control: dist.ProcessGroup | None,
) -> Path:
    """As `save`, of boxes that are grouped by tensor already; `keep` None removes nothing. Collective."""
    directory = Path(directory)
    final, saving = layout.step_path(directory, step), layout.saving_path(directory, step)
    on_first_rank(partial(_begin, directory, final), control, CheckpointError)
    try:
        metadata = on_every_rank(lambda: _write(saving, boxes, control), control, CheckpointError)
        finish = partial(_finish, saving, final, {**state, "step": step}, metadata)
        on_first_rank(finish, control, CheckpointError)
    except CheckpointError:
        if is_first(control):
            shutil.rmtree(saving, ignore_errors=True)
        raise
    if keep is not None:
        on_first_rank(lambda: _remove(layout.checkpoints(directory)[:-keep]), control, CheckpointError)
    return final


class _Planner(DefaultSavePlanner):
    """DCP's planner over `Boxes`, which are not tensors: looks boxes up itself, and refuses a tensor with holes."""

    def __init__(self):
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def lookup_object(self, index: MetadataIndex) -> torch.Tensor:
        boxes: Boxes = self.state_dict[index.fqn]
        return boxes.__get_tensor_shard__(index)

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        plans, metadata = super().create_global_plan(all_plans)
        for key, tensor in metadata.state_dict_metadata.items():
            held = sum(prod(chunk.sizes) for chunk in tensor.chunks)
            if held != prod(tensor.size):
                raise CheckpointError(
                    f"all ranks together hold {held} of {prod(tensor.size)} elements of {key}: fragments are missing"
                )
        return plans, metadata


class _Writer(RecordingWriter):
    """DCP's writer with bounded files: it keeps host copies of the boxes of a file until the file is written."""

    def write_data(self, plan: SavePlan, planner: _Planner) -> Future:
        files: Queue = Queue()
        for index, items in enumerate(_by_file(plan.items)):
            name = f"{plan.storage_data.prefix}{index}.distcp"
            files.put((self.path / name, name, items))
        return self._write_data(planner, files)


def _by_file(items: list[WriteItem]) -> Iterator[list[WriteItem]]:
    """Cut the items of a rank, in their order, into files of about `_FILE_BYTES`."""
    file, size = [], 0
    for item in items:
        file.append(item)
        size += prod(item.tensor_data.chunk.sizes) * item.tensor_data.properties.dtype.itemsize
        if size >= _FILE_BYTES:
            yield file
            file, size = [], 0
    if file:
        yield file


def _begin(directory: Path, final: Path) -> None:
    if final.exists():
        raise CheckpointError(f"{final} is already there and is not overwritten: remove it, or write to another place")
    directory.mkdir(parents=True, exist_ok=True)
    for path in layout.leftovers(directory):
        shutil.rmtree(path)


def _write(saving: Path, boxes: dict[str, Boxes], control: dist.ProcessGroup | None) -> Metadata:
    """Let DCP write the data files and its index, each of them synced to disk."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # a process without a group is fine
            writer = _Writer(saving, overwrite=False)
            return dcp.save(
                boxes, storage_writer=writer, planner=_Planner(), process_group=control, no_dist=control is None
            )
    except CheckpointException as error:
        causes = [f"rank {rank}: {cause}" for rank, (cause, _) in sorted(error.failures.items())]
        raise CheckpointError(f"writing {saving} failed: {'; '.join(causes[:4])}") from error


def _finish(saving: Path, final: Path, state: dict, metadata: Metadata) -> None:
    """Write the manifest and give the directory its name."""
    sizes = {path.name: path.stat().st_size for path in sorted(saving.iterdir())}
    absent = {info.relative_path for info in metadata.storage_data.values()} - set(sizes)
    if absent:
        raise CheckpointError(
            f"rank 0 does not see {some(sorted(absent))} in {saving}: every node must write to one shared file system"
        )
    whole = {
        "format": layout.FORMAT,
        **state,
        "versions": {"megavl": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "files": sizes,
        "tensors": {
            key: {"shape": list(tensor.size), "dtype": str(tensor.properties.dtype).removeprefix("torch.")}
            for key, tensor in sorted(metadata.state_dict_metadata.items())
        },
    }
    with open(saving / layout.STATE, "w", encoding="utf-8") as file:
        json.dump(whole, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    _sync(saving)
    saving.rename(final)
    _sync(final.parent)


def _remove(paths: list[Path]) -> None:
    for path in paths:
        hidden = layout.removing_path(path)
        path.rename(hidden)
        shutil.rmtree(hidden)


def _sync(directory: Path) -> None:
    """Put the names in a directory on disk."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
