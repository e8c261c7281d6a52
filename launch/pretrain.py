"""Pretrain a DeepSeek-VL model.

    deepspeed launch/pretrain.py --config launch/recipes/NAME.yaml [section.field=value ...]

The same script runs under torchrun, srun and as one plain python process; data parallelism is what remains of the
world after parallel.tensor and parallel.pipeline. `--dry-run --world N` prints the plan of the run and starts nothing;
with `--execute RANK` it runs the program of that rank on tensors without memory, and prints what that needs and does.
"""

import argparse
import gc
import sys
import time
from datetime import timedelta
from typing import get_args

from megavl.config.error import ConfigError
from megavl.config.files import check_files, missing_data
from megavl.config.load import load_run
from megavl.config.rules import check
from megavl.config.run import Device, RunConfig
from megavl.plan.fit import check_memory
from megavl.plan.report import describe
from megavl.rehearsal.rules import check_rank

# Rank 0 may still be importing when another rank has found that the recipe cannot be run.
_SPEAKING_S = 10


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", required=True, metavar="RECIPE.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value")
    parser.add_argument("--dry-run", action="store_true", help="print the plan of the run, without GPUs, and stop")
    parser.add_argument(
        "--device", choices=get_args(Device), help="with --dry-run: plan for this device, as parallel.device does"
    )
    parser.add_argument(
        "--world",
        type=int,
        metavar="N",
        help="with --dry-run: ranks to plan for (default: the fewest, tensor * pipeline * expert)",
    )
    parser.add_argument(
        "--execute",
        type=int,
        metavar="RANK",
        help="with --dry-run: run one step of each kind as this rank, on tensors without memory and with the operators "
        "of a GPU, and print its peak memory, kernels and messages",
    )
    # The deepspeed launcher passes it; LOCAL_RANK says the same.
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    args = parser.parse_intermixed_args()
    if args.world is not None and (args.world < 1 or not args.dry_run):
        parser.error(f"--world {args.world}: a number of ranks, 1 or more, to plan for with --dry-run")
    if args.device is not None and not args.dry_run:
        parser.error(f"--device {args.device} needs --dry-run, which plans for it; a run takes parallel.device")
    if args.execute is not None and not args.dry_run:
        parser.error(f"--execute {args.execute} needs --dry-run, with which a rank runs on tensors without memory")
    return args


def describe_data(config: RunConfig) -> str:
    """What the run would read of each source, if its datasets are there. Ends the process where they do not fit."""
    if missing := missing_data(config.data):
        return "\n  ".join(["Data: files are missing, without which this run would not start:", *missing])
    # Imported here: the plan of a run does not need the readers of the data.
    from megavl.data.errors import DataError
    from megavl.data.sampler import Sampler

    try:
        return f"Data, as expected: {Sampler(config.data, config.model, config.train).expected()}"
    except DataError as error:
        sys.exit(f"error: {error}")


def describe_rank(config: RunConfig, world: int, rank: int) -> str:
    """Execute one step of each kind as a rank, and describe what it needs and does. Ends the process if it cannot."""
    # Imported here: the plan of a run does not need torch. What the imports create stays, as in a run.
    gc.disable()
    from megavl.ops.dispatch import OpsError
    from megavl.rehearsal import report
    from megavl.rehearsal.execute import execute
    from megavl.rehearsal.gpus import GPUS

    gc.freeze()
    gc.enable()

    try:
        return report.describe(
            execute(
                config, world, rank, GPUS["ampere" if (config.parallel.device or "").startswith("a100") else "hopper"]
            ),
            config,
        )
    except OpsError as error:
        sys.exit(f"error: {error}")


def main() -> None:
    args = arguments()
    if args.dry_run:
        device = [f"parallel.device={args.device}"] if args.device else []
        try:
            config = load_run(args.config, [*args.overrides, *device])
            world = args.world or config.parallel.model * config.parallel.expert
            check(config, world)
            if args.execute is not None:
                check_rank(config, world, args.execute)
        except ConfigError as error:
            sys.exit(f"error: {error}")
        if args.execute is None:
            print(describe(config, world))
            print(f"\n{describe_data(config)}")
        else:
            print(describe_rank(config, world, args.execute))
        return

    # Imported here: a dry run needs neither torch nor DeepSpeed, whose import takes seconds. What they create
    # stays, and searching it for garbage would take a fifth of that time.
    gc.disable()
    from megavl.checkpoint.error import CheckpointError
    from megavl.parallel.agree import RunError
    from megavl.runtime.env import LaunchError, process_group, read_env
    from megavl.runtime.loop import train

    gc.freeze()
    gc.enable()

    try:
        env = read_env()
        config = load_run(args.config, args.overrides)
        check(config, env.world)
        check_memory(config, env.world)
        check_files(config)
        with process_group(env, timeout=timedelta(seconds=config.train.timeout_s)):
            train(config, env)
    except LaunchError as error:
        sys.exit(f"error: {error}")
    except (ConfigError, CheckpointError, RunError) as error:
        # Every rank has the same error, and rank 0 says it.
        if env.rank == 0:
            sys.exit(f"error: {error}")
        # A launcher ends all ranks as soon as one has failed, which must not be before rank 0 has spoken.
        time.sleep(_SPEAKING_S)
        sys.exit(1)


if __name__ == "__main__":
    main()
