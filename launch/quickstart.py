"""The main job on real input, as the command lines that a user would type.

    python launch/quickstart.py

Documents are made from what Python has installed, a tokenizer is trained, datasets are built, verified and put on a
page to look at; a small model with every part of DeepSeek-VL-7B is trained on four CPU processes as TP2 x PP2 with
sequence parallelism; one rank is killed; the same run goes on as PP2 x DP2; the result is exported and compared with
transformers. Any part that fails ends this with its exit code.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import psutil

DATA = "data/quickstart"
RECIPE = "launch/recipes/quickstart.yaml"
RUN = Path("runs/quickstart")
METRICS = RUN / "metrics.jsonl"
PAGE = f"{DATA}/inspect.html"
RANKS = 4
# The recipe writes a checkpoint after step 100, so the steps from 101 on are lost, and done again by another topology.
KILL_AFTER_STEP = 107
# Longest silence of a healthy run.
SILENCE_S = 300
# A kind of step has learned when the mean loss of its last ten steps is this much below that of its first three.
LOSS_MUST_FALL_BY_NATS = 1.0

TRAIN = f"DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 deepspeed --num_gpus {RANKS} launch/pretrain.py --config {RECIPE}"


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


def steps_done() -> list[dict]:
    """The steps that the run has written so far; a line that is still being written is not one."""
    if not METRICS.exists():
        return []
    return [json.loads(line) for line in METRICS.read_text().splitlines(keepends=True) if line.endswith("\n")]


def ranks_of(launcher: subprocess.Popen) -> dict[int, psutil.Process]:
    """Rank -> process, below the launcher. Only the training processes are told their local rank."""
    found = {}
    for process in psutil.Process(launcher.pid).children(recursive=True):
        for argument in process.cmdline():
            if argument.startswith("--local_rank="):
                found[int(argument.partition("=")[2])] = process
    return found


def wait_for_step(step: int, launcher: subprocess.Popen) -> None:
    """Return when the run has written `step`. Ends the program where the run stops before, or falls silent."""
    seen, heard = 0, time.monotonic()
    while (done := len(steps_done())) < step:
        if launcher.poll() is not None:
            sys.exit(f"quickstart: training stopped by itself after {done} steps, exit code {launcher.returncode}")
        if done > seen:
            seen, heard = done, time.monotonic()
        if time.monotonic() - heard > SILENCE_S:
            sys.exit(f"quickstart: no step for {SILENCE_S} s after {done} steps")
        time.sleep(0.1)


def train_and_kill(command: str) -> None:
    """Start training, kill one rank in the middle of it, and see that no rank is left."""
    say(f"\n$ {command}")
    launcher = subprocess.Popen(command, shell=True)
    try:
        wait_for_step(KILL_AFTER_STEP, launcher)
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


def summary(seconds: float) -> bool:
    """Print what was reached. True where both kinds of steps have learned."""
    rows = steps_done()
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
    for name, part in (("TP2 x PP2 + sequence", rows[:resumed]), ("PP2 x DP2", rows[resumed:])):
        tokens, spent_s = sum(row["tokens"] for row in part), sum(row["step_s"] for row in part)
        if part:
            print(f"{name}: steps {part[0]['step']} to {part[-1]['step']}, {tokens / spent_s:.0f} tokens/s")
    for what, path in (
        ("loss curve", RUN / "loss.png"),
        ("metrics", METRICS),
        ("TensorBoard", RUN / "tensorboard"),
        ("checkpoints", RUN / "checkpoints"),
        ("HF checkpoint", RUN / "hf"),
        ("datasets", DATA),
        ("inspection", PAGE),
    ):
        print(f"{what:14} {path}")
    return learned


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    started = time.monotonic()
    run(f"rm -rf {DATA} {RUN}")

    run(f"python tools/make_corpus.py --output {DATA}")
    tokenizer = f"{DATA}/tokenizer.model"
    run(f"python tools/train_tokenizer.py --input {DATA}/text.jsonl {DATA}/multimodal.jsonl --output {tokenizer}")
    for name, source in (("text", "text"), ("multimodal", "multimodal"), ("heldout", "heldout_multimodal")):
        store = f"--input {DATA}/{source}.jsonl --output-prefix {DATA}/{name}"
        run(f"python tools/preprocess_data.py {store} --tokenizer {tokenizer}")
    run(f"python tools/verify_data.py {DATA}/text {DATA}/multimodal --tokenizer {tokenizer}")
    run(f"python tools/inspect_data.py --config {RECIPE} --html {PAGE}")

    train_and_kill(TRAIN)
    run(f"{TRAIN} parallel.tensor=1 parallel.sequence=false")

    checkpoint = RUN / "checkpoints" / f"step_{steps_done()[-1]['step']:08d}"
    run(f"python tools/convert_checkpoint.py to-hf --checkpoint {checkpoint} --output {RUN}/hf --layout transformers")
    run(
        f"python tools/check_export.py --checkpoint {checkpoint} --hf {RUN}/hf --data {DATA}/heldout "
        f"--image {DATA}/images/heldout_multimodal_00000.png"
    )
    run(f"python tools/plot_loss.py --metrics {METRICS} --output {RUN}/loss.png")
    if not summary(time.monotonic() - started):
        sys.exit("quickstart: the loss did not fall on every kind of steps, or the run was not resumed")


if __name__ == "__main__":
    main()
