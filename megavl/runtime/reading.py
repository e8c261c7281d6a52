"""What a run reads of each source, expected and so far: on the console, and in `data.json` of the output folder."""

import json
import os
from dataclasses import asdict
from pathlib import Path

from megavl.batch import Kind
from megavl.data.sampler import Sampler


def announce(sampler: Sampler, first_step: int, repacked: list[Kind]) -> None:
    """Print what the whole run is expected to read, and which streams cannot go on from the checkpoint's position."""
    for kind in repacked:
        print(
            f"data: the checkpoint does not know this run's {kind} packs (sources, weights, lengths or the seed have "
            f"changed, or it is an older one); those before step {first_step} are packed again, from lengths alone"
        )
    print(f"data of the whole run, as expected: {sampler.expected()}", flush=True)


def report(sampler: Sampler, done: int, output_dir: str) -> None:
    """Print what was read in the first `done` steps (after the last one as a table), and write `data.json`."""
    read = sampler.read(done)
    print(f"data of {done} steps: {read if done == sampler.train.steps else read.headline}", flush=True)
    path = Path(output_dir) / "data.json"
    temporary = path.with_suffix(".json.tmp")
    temporary.write_text(json.dumps({"expected": asdict(sampler.expected()), "read": asdict(read)}, indent=1) + "\n")
    os.replace(temporary, path)
