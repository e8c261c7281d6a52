"""Reading a checkpoint into a run of any topology; everything is verified before the first value changes."""

from collections.abc import Iterable
from pathlib import Path

import torch.distributed as dist

from megavl.checkpoint.error import CheckpointError, some
from megavl.checkpoint.fragments import Fragment, by_key
from megavl.checkpoint.layout import locate
from megavl.checkpoint.reader import OTHER_PARAMETERS, Checkpoint
from megavl.config.model import ModelConfig
from megavl.parallel.agree import gather, on_every_rank


def load(
    path: str | Path, fragments: Iterable[Fragment], model: ModelConfig, control: dist.ProcessGroup | None
) -> None:
    """Fill the values of all fragments from the checkpoint at `path`. Collective.

    What the ranks ask for must together be all that the checkpoint holds of the kinds that they ask for. In the
    precision of the checkpoint's run every value is exact. Across precisions the fp32 value is the authority: an
    fp32 parameter is read from the master of a bf16 run, a master that was not saved from its parameter, and a bf16
    parameter is the rounded fp32 one.

    control: gloo group over the world (`Mesh.control`); None for a process without process groups

    Raises:
        CheckpointError: the same on all ranks and before any value changes, where files are missing or truncated, the
            model is another one, or tensors are missing, left over or of another shape. Also where the reading
            itself fails, with values partly read.
    """
    fragments = list(fragments)
    _fill(path, fragments, model, {fragment.kind for fragment in fragments}, control)


def load_weights(
    path: str | Path, fragments: Iterable[Fragment], model: ModelConfig, control: dist.ProcessGroup | None
) -> None:
    """As `load`, but of the weights alone, for the start of a run; `path` is anything that `locate` finds. Collective.

    Fills fragments of the kinds "param" and "master", both from the most precise value of the parameter that the
    checkpoint has, and leaves those of other kinds as they are.
    """
    weights = [fragment for fragment in fragments if fragment.kind in ("param", "master")]
    found = on_every_rank(lambda: locate(path), control, CheckpointError)
    _fill(found, weights, model, {"param"}, control)


def _fill(
    path: str | Path,
    fragments: list[Fragment],
    model: ModelConfig,
    kinds: set[str],
    control: dist.ProcessGroup | None,
) -> None:
    """Verify, then read. `kinds`: those that must be asked for in full."""
    checkpoint = on_every_rank(lambda: Checkpoint(path), control, CheckpointError)
    on_every_rank(lambda: checkpoint.check_model(model), control, CheckpointError)
    boxes = on_every_rank(lambda: by_key(fragments), control, CheckpointError)
    plan = on_every_rank(lambda: checkpoint.plan(boxes), control, CheckpointError)
    _check_none_left(checkpoint, set(boxes), kinds, control)
    on_every_rank(lambda: checkpoint.read(boxes, plan), control, CheckpointError)


def _check_none_left(
    checkpoint: Checkpoint, asked: set[str], kinds: set[str], control: dist.ProcessGroup | None
) -> None:
    """Every tensor of the kinds in question must be asked for by some rank.

    One byte per tensor and rank is gathered, not the names: those are thousands on each of thousands of ranks.
    """
    keys = sorted(checkpoint.tensors)
    masks = gather(bytes(key in asked for key in keys), control)
    kinds = set().union(*gather(kinds, control))
    left = [
        key
        for key, wanted in zip(keys, zip(*masks, strict=True), strict=True)
        if key.split(".", 1)[0] in kinds and not any(wanted)
    ]
    if left:
        raise CheckpointError(
            f"checkpoint {checkpoint.path} also holds {some(left)}, which this run does not have. Nothing was loaded; "
            f"{OTHER_PARAMETERS}"
        )
