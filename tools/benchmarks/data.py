"""The data path, subject by subject."""

import argparse
import tempfile
from contextlib import nullcontext
from datetime import date
from importlib import import_module
from pathlib import Path

from benchmarks.measure import Setting, command_line, processor

from megavl import __version__


def run(args: argparse.Namespace) -> None:
    """Print the tables that the command line asks for."""
    if args.directory:
        args.directory.mkdir(parents=True, exist_ok=True)
    with nullcontext(args.directory) if args.directory else tempfile.TemporaryDirectory() as directory:
        setting = Setting(
            directory=Path(directory),
            megabytes=args.megabytes,
            images=args.images,
            workers=args.workers,
            repetitions=args.repetitions,
            resume_at=args.resume_at,
            megatron=args.megatron,
        )
        print(f"{date.today()}, {processor()}, megavl {__version__}: `{command_line()}`")
        for subject in args.subjects:
            for section in import_module(f"benchmarks.{subject}").run(setting):
                print(f"\n{section}", flush=True)
