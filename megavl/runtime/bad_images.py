"""Images that could not be decoded: each is replaced, counted and written down, and too many end the run."""

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path

import torch.distributed as dist

from megavl.batch import BadImage
from megavl.config.run import RunConfig
from megavl.parallel.agree import RunError, on_first_rank


class BadImages:
    """The account of a run, the same on every rank. `count` is how many there were since its start."""

    def __init__(self, config: RunConfig, count: int, control: dist.ProcessGroup):
        self.count, self._control = count, control
        self._budget = config.data.bad_images
        self._log = Path(config.output_dir) / "bad_images.jsonl"

    def record(self, step: int, found: Iterable[BadImage]) -> None:
        """Take over those of a step. Every rank calls it with the same ones; with any, it is collective.

        An image that several tensor ranks decoded is one; one that a later epoch meets again counts again. Rank 0
        writes the log.

        Raises:
            RunError: there are more than `data.bad_images` now.
        """
        images = sorted(set(found), key=lambda bad: (bad.pack, bad.image))
        if not images:
            return
        self.count += len(images)
        on_first_rank(lambda: self._write(step, images), self._control)
        first = images[0]
        told = (
            f"step {step + 1} has images that cannot be decoded, {len(images)} of them; the first: {first.dataset}: "
            f"document {first.document}: the image in its sequence {first.sequence} is broken: {first.reason}. "
        )
        if self.count > self._budget:
            raise RunError(
                f"{told}With them there are {self.count} in this run, and data.bad_images allows {self._budget}; "
                f"{self._log} lists them; mend the datasets, or raise data.bad_images to train with blank images in "
                "their places"
            )
        if dist.get_rank() == 0:
            print(f"{told}Blank images take their places: {self.count} of {self._budget}, see {self._log}", flush=True)

    def _write(self, step: int, images: list[BadImage]) -> None:
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with open(self._log, "a", encoding="utf-8") as log:
            for bad in images:
                log.write(json.dumps({"step": step + 1} | dataclasses.asdict(bad), ensure_ascii=False) + "\n")
