"""Check one CUDA device: everything that a single GPU can prove about this project, most important first.

    python tools/gpu_check.py [--minutes 5] [--only STAGE ...] [--output runs/gpu_check]

Each stage is a process of its own with a time limit: a crash or a hang costs that stage only. The results are written
after every stage: OUTPUT/report.md (one table, then the kernels of each slice), OUTPUT/report.json and
OUTPUT/output.txt (what the stages printed). The exit code is 1 if a stage failed, 3 if none failed but some found no
time left, and 2 if there is no CUDA device or an option is wrong.

    python tools/gpu_check.py --rehearse

runs the same stages at tiny size on a CPU. What exists on CUDA only is reported as skipped.
"""

import argparse
import os
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def parser() -> argparse.ArgumentParser:
    from gpu.stage import STAGES

    listed = "\n".join(f"  {stage.name:18} {stage.proves}" for stage in STAGES)
    options = argparse.ArgumentParser(
        description=__doc__,
        epilog=f"stages, in the order in which they run:\n{listed}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    options.add_argument("--minutes", type=float, default=5, help="time for all stages together (default 5)")
    options.add_argument("--only", nargs="+", metavar="STAGE", help="stages to run; `slices` is all slices")
    options.add_argument("--output", type=Path, default=ROOT / "runs" / "gpu_check", metavar="DIR")
    options.add_argument("--rehearse", action="store_true", help="run at tiny size on a CPU")
    # A stage is this script again, in a process of its own.
    options.add_argument("--stage", help=argparse.SUPPRESS)
    options.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    return options


def main() -> None:
    sys.path.insert(0, str(ROOT))  # the project need not be installed
    asked = parser().parse_args()
    if asked.stage:
        from gpu.child import run_stage

        code = run_stage(asked.stage, asked.work, asked.rehearse)
        sys.stdout.flush()
        os._exit(code)  # no teardown: it may hang after an error of the device

    from gpu.device import cuda_devices
    from gpu.runner import check
    from gpu.stage import LEAST_S, select

    if not LEAST_S <= asked.minutes * 60 < float("inf"):
        parser().error(f"--minutes {asked.minutes:g}: a stage needs {LEAST_S:.0f} s, give {LEAST_S / 60:g} or more")
    try:
        stages = select(asked.only)
    except ValueError as error:
        parser().error(str(error))
    if not asked.rehearse and cuda_devices() == 0:
        print("error: there is no CUDA device here; --rehearse runs the same stages on a CPU", file=sys.stderr)
        sys.exit(2)
    try:
        asked.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser().error(f"--output {asked.output} cannot be written to: {error}")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends like Ctrl-C, with a report
    sys.exit(check(stages, Path(__file__).resolve(), asked.minutes * 60, asked.output.resolve(), asked.rehearse))


if __name__ == "__main__":
    main()
