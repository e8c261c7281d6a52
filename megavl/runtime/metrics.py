"""What a run shows: a console table, metrics.jsonl with one object per step, TensorBoard."""

import json
import resource
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from megavl.batch import StepBatch
from megavl.config.run import RunConfig
from megavl.parallel.agree import on_first_rank
from megavl.plan.cost import step_flops
from megavl.plan.hardware import peak_flops
from megavl.runtime.balance import Load
from megavl.runtime.env import Env

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

_COLUMNS = (
    ("step", 14),
    ("kind", 10),
    ("loss", 8),
    ("grad norm", 9),
    ("lr", 9),
    ("tokens/s", 9),
    ("images", 6),
    ("MFU", 6),
    ("s/step", 7),
    ("memory", 8),
)
_SQUARE = 8  # pixels along the side of an expert in the picture of the load
_LOAD = ("max/mean load", 13)  # of the experts of the worst layer


class Metrics:
    """Rank 0 writes; the other ranks only take part in the collectives."""

    def __init__(self, config: RunConfig, env: Env, control: dist.ProcessGroup | None):
        """Collective: on a device of unknown peak all ranks measure together."""
        self._config, self._env, self._control = config, env, control
        self._peak_flops, origin = peak(env)
        self._file = self._board = None
        on_first_rank(lambda: self._open(origin), control)

    def _open(self, origin: str) -> None:
        folder = Path(self._config.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        self._file = open(folder / "metrics.jsonl", "a", encoding="utf-8", buffering=1)  # noqa: SIM115
        self._board = _board(folder / "tensorboard") if self._config.log.tensorboard else None
        print(f"MFU is relative to {self._peak_flops * self._env.world / 1e12:.3g} TFLOP/s, {origin}")
        self._columns = _COLUMNS if self._config.model.decoder.moe is None else (*_COLUMNS, _LOAD)
        print(" ".join(name.rjust(width) for name, width in self._columns))

    def record(
        self, batch: StepBatch, loss: float, grad_norm: float, lr: float, step_s: float, load: Load | None
    ) -> None:
        """One step; `load` is None where the model has no experts. Collective: memory is that of the fullest rank.

        Raises:
            RunError: the files cannot be written.
        """
        memory = torch.tensor(memory_bytes(self._env.device), dtype=torch.int64, device=self._env.device)
        dist.all_reduce(memory, dist.ReduceOp.MAX)
        on_first_rank(
            lambda: self._write(self._row(batch, loss, grad_norm, lr, step_s, memory.item()), load), self._control
        )

    def _row(self, batch: StepBatch, loss: float, grad_norm: float, lr: float, step_s: float, memory: int) -> dict:
        flops = step_flops(self._config, **batch.counts)
        capacity = self._peak_flops * self._env.world * step_s
        return {
            "step": batch.step + 1,
            "kind": batch.kind,
            "loss": loss,
            "loss_text": loss if batch.kind == "text" else None,
            "loss_multimodal": loss if batch.kind == "multimodal" else None,
            "grad_norm": grad_norm,
            "lr": lr,
            "tokens": batch.tokens,
            "images": batch.images,
            "tiles": batch.tiles,
            "tokens_per_s": batch.tokens / step_s,
            "step_s": step_s,
            "mfu": flops.model / capacity,
            "hardware_utilization": flops.hardware / capacity,
            "memory_bytes": memory,
            "time": time.time(),
        }

    def _write(self, row: dict, load: Load | None) -> None:
        if load is not None:
            row["experts"] = experts(load)
        self._file.write(json.dumps(row) + "\n")
        if self._board is not None:
            for name, value in row.items():
                if isinstance(value, (int, float)) and name not in ("step", "time"):
                    self._board.add_scalar(name, value, row["step"])
            if load is not None:
                _show(load, row, self._board)
        if row["step"] % self._config.log.every == 0 or row["step"] == self._config.train.steps:
            self._print(row)

    def _print(self, row: dict) -> None:
        cells = [
            f"{row['step']}/{self._config.train.steps}",
            row["kind"],
            f"{row['loss']:.4f}",
            f"{row['grad_norm']:.3f}",
            f"{row['lr']:.2e}",
            f"{row['tokens_per_s']:.0f}",
            f"{row['images']}",
            f"{row['mfu']:.1%}",
            f"{row['step_s']:.2f}",
            f"{row['memory_bytes'] / 2**30:.2f}G",
        ]
        if "experts" in row:
            cells.append(f"{max(layer['max_over_mean'] for layer in row['experts'].values()):.2f}")
        print(" ".join(cell.rjust(width) for cell, (_, width) in zip(cells, self._columns, strict=True)), flush=True)

    def close(self) -> None:
        """End the files."""
        for output in (self._file, self._board):
            if output is not None:
                output.close()


def _board(folder: Path) -> "SummaryWriter":
    # Imported here: a run without TensorBoard needs neither its package nor the time of its import.
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(folder)


def experts(load: Load) -> dict[str, dict]:
    """The load for metrics.jsonl: block index -> tokens per expert and their statistics."""
    columns = {
        "max_over_mean": load.max_over_mean.tolist(),
        "entropy": load.entropy.tolist(),
        "auxiliary": load.auxiliary.tolist(),
        "tokens": load.tokens.tolist(),
    }
    if load.bias is not None:
        columns |= {"bias_min": load.bias.amin(1).tolist(), "bias_max": load.bias.amax(1).tolist()}
    return {
        str(layer): {name: values[place] for name, values in columns.items()} for place, layer in enumerate(load.layers)
    }


def _show(load: Load, row: dict, board: "SummaryWriter") -> None:
    """A curve of each number of each layer; and the load of every expert as a picture, a row for each layer: grey is
    the mean of the layer, black is idle, white twice the mean or more."""
    for layer, numbers in row["experts"].items():
        for name, value in numbers.items():
            if name != "tokens":
                board.add_scalar(f"experts_{name}/block_{int(layer):02}", value, row["step"])
    grey = (load.relative / 2).clamp(max=1).float()  # [layers, E]
    pixels = grey.repeat_interleave(_SQUARE, 0).repeat_interleave(_SQUARE, 1)
    board.add_image("experts/load", pixels, row["step"], dataformats="HW")


def memory_bytes(device: torch.device) -> int:
    """Peak memory of this process: allocated on the device, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit_bytes = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit_bytes


def peak(env: Env) -> tuple[float, str]:
    """FLOP/s that one rank could do, and where the number is from."""
    name = torch.cuda.get_device_name(env.device) if env.device.type == "cuda" else "cpu"
    known = peak_flops(name)
    if known is not None:
        return known, f"the data sheet's dense bf16 rate of {env.world} x {name}"
    rate = torch.tensor(_matmul_flops(env.device), dtype=torch.float64, device=env.device)
    dist.all_reduce(rate)
    return rate.item() / env.world, f"measured now: fp32 matrix products on all {env.world} ranks at once"


def _matmul_flops(device: torch.device) -> float:
    """FLOP/s of matrix products of 512 x 512, over a quarter of a second."""
    size = 512
    a = torch.ones(size, size, device=device)
    dist.barrier()
    started, products = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - started) < 0.25 or products == 0:
        (a @ a).sum().item()  # .item() waits for the device
        products += 1
    return 2 * size**3 * products / elapsed
