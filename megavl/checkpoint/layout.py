"""Where checkpoints lie, and what a directory must hold to be one.

DIR/step_00000010/state.json     the state, and the manifest: every tensor's shape and dtype, every file's size
                  .metadata      DCP's index: which box of which tensor lies where
                  __0_0.distcp   boxes, one file for each rank that wrote
DIR/.step_00000020.saving/       a save under way, or one that was killed
"""

import json
import re
from pathlib import Path

from megavl.checkpoint.error import CheckpointError, some

STATE = "state.json"
FORMAT = 1
_NAME = re.compile(r"step_(\d{8,})")
_LEFTOVER = re.compile(r"\.step_\d{8,}\.(saving|removing)")


def step_path(directory: str | Path, step: int) -> Path:
    """Final name of the checkpoint of a step."""
    return Path(directory) / f"step_{step:08d}"


def saving_path(directory: str | Path, step: int) -> Path:
    """Name under which it is written."""
    return Path(directory) / f".step_{step:08d}.saving"


def removing_path(path: Path) -> Path:
    """Name that an old checkpoint takes before its files go, so that no final name ever holds a part of one."""
    return path.with_name(f".{path.name}.removing")


def checkpoints(directory: str | Path) -> list[Path]:
    """The checkpoints in a directory, oldest step first."""
    directory = Path(directory)
    found = [path for path in directory.iterdir() if _NAME.fullmatch(path.name)] if directory.is_dir() else []
    return sorted(found, key=lambda path: int(_NAME.fullmatch(path.name)[1]))


def leftovers(directory: str | Path) -> list[Path]:
    """What killed saves and removals left in a directory."""
    return [path for path in Path(directory).iterdir() if _LEFTOVER.fullmatch(path.name)]


def latest(directory: str | Path) -> Path | None:
    """The checkpoint of the highest step in a directory; None where there is none."""
    found = checkpoints(directory)
    return found[-1] if found else None


def locate(path: str | Path) -> Path:
    """The checkpoint meant by a path: itself, the latest in it, or the latest in its `checkpoints` folder.

    Raises:
        CheckpointError: there is none.
    """
    path = Path(path)
    if (path / STATE).exists() or _NAME.fullmatch(path.name):
        return path
    found = latest(path) or latest(path / "checkpoints")
    if found is None:
        raise CheckpointError(
            f"no checkpoint in {path}: expected a directory step_<number>, or one that holds such directories"
        )
    return found


def read_state(path: str | Path) -> dict:
    """The state of a checkpoint with its manifest, which lies under "tensors" and "files".

    Raises:
        CheckpointError: it is not there, not whole, or of another format.
    """
    file = Path(path) / STATE
    try:
        state = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is not a complete checkpoint: it has no {STATE}; use another one") from None
    except ValueError as error:
        raise CheckpointError(f"{file} is damaged ({error}): use another checkpoint") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CheckpointError(f"{file} is not of checkpoint format {FORMAT}, the one this version of megavl reads")
    missing = [key for key in ("step", "config", "tensors", "files") if key not in state]
    if missing:
        raise CheckpointError(f"{file} is damaged: it lacks {', '.join(missing)}; use another checkpoint")
    return state


def verify_files(path: str | Path, files: dict[str, int]) -> None:
    """Check that the files of a manifest are there at their full sizes (bytes).

    Raises:
        CheckpointError: naming the files that are missing or of another size.
    """
    sizes = {name: (Path(path) / name).stat().st_size if (Path(path) / name).is_file() else None for name in files}
    broken = [
        f"{name} is missing" if sizes[name] is None else f"{name} has {sizes[name]} bytes of {size}"
        for name, size in files.items()
        if sizes[name] != size
    ]
    if broken:
        raise CheckpointError(
            f"checkpoint {path} is incomplete: {some(broken)}. Nothing was loaded; restore the "
            "files, use another checkpoint, or remove this one, so that a run goes on from the one before"
        )
