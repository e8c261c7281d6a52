"""The main job on real input, as the command lines that a user would type.

    python launch/quickstart.py [--model vl|vl2]

Documents are made from what Python has installed, a tokenizer is trained, datasets are built, verified and put on a
page to look at; a small model is trained on four CPU processes; one rank is killed; the same run goes on under another
topology; the result is exported and read back.

    vl   every part of DeepSeek-VL-7B, as PP2 x DP2, then TP2 x PP2 with sequence parallelism; the export is compared
         with transformers
    vl2  every part of DeepSeek-VL2, as EP2 x PP2, then EP4, on tiled images and a grounding task; the export's language
         part is compared with transformers, and so is the model read back from it

Any part that fails ends this with its exit code.
"""

import argparse
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

RANKS = 4
# The recipes write a checkpoint after step 100, so the steps from 101 on are lost, and done again by another topology.
KILL_AFTER_STEP = 107
# Longest silence of a healthy run.
SILENCE_S = 300
# A kind of step has learned when the mean loss of its last ten steps is this much below that of its first three.
LOSS_MUST_FALL_BY_NATS = 1.0


@dataclass(frozen=True)
class Topology:
    """How the ranks are laid out: in words, and as overrides of the recipe."""

    name: str
    overrides: str = ""


@dataclass(frozen=True)
class Model:
    """What differs between the two.

    data, run:     folders, which are made anew
    corpus, tokenizer, preprocess: options of the tools
    datasets:      name of each, and of the file that it is made from
    trained:       those that the recipe trains on
    before, after: the recipe's topology, and the one under which the killed run goes on
    export:        the tools that export the last checkpoint and prove it, with their options
    plots:         what tools/plot_NAME.py draws
    """

    data: str
    run: Path
    recipe: str
    corpus: str
    tokenizer: str
    preprocess: str
    datasets: dict[str, str]
    trained: tuple[str, ...]
    before: Topology
    after: Topology
    export: tuple[str, ...]
    plots: tuple[str, ...]

    @property
    def metrics(self) -> Path:
        return self.run / "metrics.jsonl"

    @property
    def page(self) -> str:
        return f"{self.data}/inspect.html"

    @property
    def train(self) -> str:
        launch = f"DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 deepspeed --num_gpus {RANKS} launch/pretrain.py"
        return f"{launch} --config {self.recipe}"


MODELS = {
    "vl": Model(
        data="data/quickstart",
        run=Path("runs/quickstart"),
        recipe="launch/recipes/quickstart.yaml",
        corpus="",
        tokenizer="",
        preprocess="",
        datasets={"text": "text", "multimodal": "multimodal", "heldout": "heldout_multimodal"},
        trained=("text", "multimodal"),
        before=Topology("PP2 x DP2"),
        after=Topology("TP2 x PP2 + sequence", "parallel.tensor=2 parallel.sequence=true train.micro_batch=4"),
        export=(
            "convert_checkpoint.py to-hf --checkpoint {checkpoint} --output {run}/hf --layout transformers",
            "check_export.py --checkpoint {checkpoint} --hf {run}/hf --data {data}/heldout "
            "--image {data}/images/heldout_multimodal_00000.png",
        ),
        plots=("loss",),
    ),
    "vl2": Model(
        data="data/quickstart_vl2",
        run=Path("runs/vl2_debug"),
        recipe="launch/recipes/vl2_debug.yaml",
        corpus=" --family vl2",
        tokenizer=" --family vl2 --vocab-size 2400",
        preprocess=" --template vl2",
        datasets={
            "text": "text",
            "multimodal": "multimodal",
            "grounding": "grounding",
            "heldout": "heldout_grounding",
        },
        trained=("text", "multimodal", "grounding"),
        before=Topology("EP2 x PP2"),
        after=Topology("EP4", "parallel.pipeline=1 parallel.expert=4"),
        export=(
            "convert_checkpoint.py to-hf --checkpoint {checkpoint} --output {run}/hf --layout deepseek",
            "check_export.py --checkpoint {checkpoint} --hf {run}/hf --data {data}/heldout "
            "--image {data}/images/heldout_multimodal_00000.png",
            "convert_checkpoint.py from-hf --input {run}/hf --output {run}/reloaded",
            "check_export.py --checkpoint {run}/reloaded --hf {run}/hf --data {data}/heldout",
        ),
        plots=("loss", "experts"),
    ),
}


def say(text: str) -> None:
    print(f"\033[1m{text}\033[0m" if sys.stdout.isatty() else text, flush=True)


def run(command: str) -> None:
    """Show a command line and run it; end with its exit code where it fails."""
    say(f"\n$ {command}")
    started = time.monotonic()
    code = subprocess.run(command, shell=True).returncode
    if code:
        print(f"quickstart: exit code {code} of: {command}", file=sys.stderr)
        sys.exit(code)
    print(f"  ({time.monotonic() - started:.0f} s)", flush=True)


def steps_done(model: Model) -> list[dict]:
    """The steps that the run has written so far; a line that is still being written is not one."""
    if not model.metrics.exists():
        return []
    return [json.loads(line) for line in model.metrics.read_text().splitlines(keepends=True) if line.endswith("\n")]


def ranks_of(launcher: subprocess.Popen) -> dict[int, psutil.Process]:
    """Rank -> process, below the launcher. Only the training processes are told their local rank."""
    found = {}
    for process in psutil.Process(launcher.pid).children(recursive=True):
        for argument in process.cmdline():
            if argument.startswith("--local_rank="):
                found[int(argument.partition("=")[2])] = process
    return found


def wait_for_step(model: Model, step: int, launcher: subprocess.Popen) -> None:
    """Return when the run has written `step`. Ends the program where the run stops before, or falls silent."""
    seen, heard = 0, time.monotonic()
    while (done := len(steps_done(model))) < step:
        if launcher.poll() is not None:
            sys.exit(f"quickstart: training stopped by itself after {done} steps, exit code {launcher.returncode}")
        if done > seen:
            seen, heard = done, time.monotonic()
        if time.monotonic() - heard > SILENCE_S:
            sys.exit(f"quickstart: no step for {SILENCE_S} s after {done} steps")
        time.sleep(0.1)


def train_and_kill(model: Model, command: str) -> None:
    """Start training with `command`, kill one rank in the middle of it, and see that no rank is left."""
    say(f"\n$ {command}")
    launcher = subprocess.Popen(command, shell=True)
    try:
        wait_for_step(model, KILL_AFTER_STEP, launcher)
        ranks = ranks_of(launcher)
        if sorted(ranks) != list(range(RANKS)):
            sys.exit(f"quickstart: expected ranks 0 to {RANKS - 1} below the launcher, found {sorted(ranks)}")
        victim = ranks[RANKS - 1]
        print("\nNow one rank is killed; the others lose their peer and say so, and the launcher ends them.")
        say(f"\n$ kill -KILL {victim.pid}    # rank {RANKS - 1} of {RANKS}, in the middle of training")
        started = time.monotonic()
        victim.kill()
        code = launcher.wait(timeout=120)
        _, left = psutil.wait_procs(ranks.values(), timeout=10)
        if code == 0 or left:
            sys.exit(f"quickstart: a rank was killed, but the launcher's exit code is {code}, still running: {left}")
        print(
            f"  the launcher saw it and stopped the others after {time.monotonic() - started:.0f} s, exit code {code}"
        )
    finally:
        if launcher.poll() is None:
            for process in psutil.Process(launcher.pid).children(recursive=True):
                process.kill()
            launcher.kill()


def mean_loss(rows: list[dict]) -> float:
    return sum(row["loss"] for row in rows) / len(rows)


def summary(model: Model, seconds: float) -> bool:
    """Print what was reached. True where both kinds of steps have learned."""
    rows = steps_done(model)
    resumed = next(
        (i for i, (a, b) in enumerate(zip(rows, rows[1:], strict=False), start=1) if b["step"] <= a["step"]), 0
    )
    learned = resumed > 0
    say(f"\nDone in {seconds:.0f} s.")
    print("kind         steps   loss of the first 3   of the last 10")
    final = [row for _, row in sorted({row["step"]: row for row in rows}.items())]
    for kind in ("text", "multimodal"):
        mine = [row for row in final if row["kind"] == kind]
        first, last = mean_loss(mine[:3]), mean_loss(mine[-10:])
        fell = last < first - LOSS_MUST_FALL_BY_NATS
        learned = learned and fell
        print(f"{kind:10}   {len(mine):5}   {first:19.3f}   {last:14.3f}{'' if fell else '   DID NOT FALL'}")
    for topology, part in ((model.before, rows[:resumed]), (model.after, rows[resumed:])):
        tokens, spent_s = sum(row["tokens"] for row in part), sum(row["step_s"] for row in part)
        if part:
            print(f"{topology.name}: steps {part[0]['step']} to {part[-1]['step']}, {tokens / spent_s:.0f} tokens/s")
    for what, path in (
        *((f"plot of {name}", model.run / f"{name}.png") for name in model.plots),
        ("metrics", model.metrics),
        ("TensorBoard", model.run / "tensorboard"),
        ("checkpoints", model.run / "checkpoints"),
        ("HF checkpoint", model.run / "hf"),
        ("datasets", model.data),
        ("inspection", model.page),
    ):
        print(f"{what:15} {path}")
    return learned


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="vl", help="default vl")
    model = MODELS[parser.parse_args().model]
    data = model.data
    started = time.monotonic()
    run(f"rm -rf {data} {model.run}")

    run(f"python tools/make_corpus.py --output {data}{model.corpus}")
    tokenizer = f"{data}/tokenizer.model"
    texts = " ".join(f"{data}/{model.datasets[name]}.jsonl" for name in model.trained)
    run(f"python tools/train_tokenizer.py --input {texts} --output {tokenizer}{model.tokenizer}")
    for name, source in model.datasets.items():
        store = f"--input {data}/{source}.jsonl --output-prefix {data}/{name}"
        run(f"python tools/preprocess_data.py {store} --tokenizer {tokenizer}{model.preprocess}")
    prefixes = " ".join(f"{data}/{name}" for name in model.trained)
    run(f"python tools/verify_data.py {prefixes} --tokenizer {tokenizer}")
    run(f"python tools/inspect_data.py --config {model.recipe} --html {model.page}")

    train_and_kill(model, model.train)
    run(f"{model.train} {model.after.overrides}")

    checkpoint = model.run / "checkpoints" / f"step_{steps_done(model)[-1]['step']:08d}"
    for tool in model.export:
        run(f"python tools/{tool}".format(checkpoint=checkpoint, run=model.run, data=data))
    for name in model.plots:
        run(f"python tools/plot_{name}.py --metrics {model.metrics} --output {model.run}/{name}.png")
    if not summary(model, time.monotonic() - started):
        sys.exit("quickstart: the loss did not fall on every kind of steps, or the run was not resumed")


if __name__ == "__main__":
    main()
