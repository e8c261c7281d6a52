"""Documents to an indexed dataset: files and folders in, PREFIX.bin, PREFIX.idx and PREFIX.meta out.

    python tools/preprocess_data.py --input FILE|FOLDER ... --output-prefix P --tokenizer T.model|tokenizer.json

What is finished is kept in PREFIX.parts until all is: after an error, Ctrl-C or a kill, the same command goes on where
it stopped. docs/data.md has the input formats.
"""

import argparse
import os
import signal
import sys
import time
from functools import partial

from megavl.data.build import Engine, build
from megavl.data.engines import local
from megavl.data.errors import DataError
from megavl.data.progress import rate, size
from megavl.data.readers.reader import ReadOptions
from megavl.data.store import Store
from megavl.data.template import TEMPLATES

# What served the tokenizer may differ from shard to shard; so many are told.
_BACKENDS = 3


def main() -> int:
    arguments = parse_arguments()
    # A polite kill unwinds like Ctrl-C.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        run(arguments)
    except (DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, SystemExit) as stop:
        print("interrupted; the same command goes on where it stopped", file=sys.stderr)
        return stop.code if isinstance(stop, SystemExit) else 130
    return 0


def parse_arguments() -> argparse.Namespace:
    cores = len(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--input", nargs="+", required=True, metavar="PATH", help="files, and folders of them, read in this order"
    )
    parser.add_argument("--output-prefix", required=True, metavar="P", help="writes P.bin, P.idx and P.meta")
    parser.add_argument("--tokenizer", required=True, metavar="T", help="sentencepiece .model or tokenizer.json")
    parser.add_argument(
        "--workers", type=int, default=cores, metavar="N", help=f"processes (default {cores}: the cores available)"
    )
    parser.add_argument(
        "--template",
        choices=TEMPLATES,
        default=ReadOptions.template,
        help=f"how conversations are written (default {ReadOptions.template})",
    )
    parser.add_argument("--engine", choices=("local", "ray"), default="local", help="what runs the work")
    parser.add_argument(
        "--ray-address", metavar="A", help="a running Ray cluster (default: start one here with --workers CPUs)"
    )
    parser.add_argument(
        "--max-bad", type=int, default=0, metavar="N", help="bad records to leave out into P.rejected.jsonl (default 0)"
    )
    parser.add_argument(
        "--max-record-bytes",
        type=int,
        default=ReadOptions.max_record_bytes,
        metavar="N",
        help=f"largest record and image (default {ReadOptions.max_record_bytes:,})",
    )
    parser.add_argument(
        "--part-bytes",
        type=int,
        metavar="N",
        help="input that a process does at a time (default: by the size of the input); small for few records that name "
        "many image files",
    )
    parser.add_argument(
        "--plain-tokenizer", action="store_true", help="tokenise with the tokenizer's own package, without gigatoken"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing dataset of that prefix")
    arguments = parser.parse_args()
    for name, least in (("workers", 1), ("max_bad", 0), ("max_record_bytes", 1), ("part_bytes", 1)):
        value = getattr(arguments, name)
        if value is not None and value < least:
            parser.error(f"--{name.replace('_', '-')} {value}: at least {least}")
    if arguments.ray_address and arguments.engine != "ray":
        parser.error("--ray-address is for --engine ray")
    return arguments


def run(arguments: argparse.Namespace) -> None:
    """Build the dataset and say what was written."""
    started = time.monotonic()
    prefix = arguments.output_prefix
    counts = build(
        arguments.input,
        prefix,
        arguments.tokenizer,
        engine=engine(arguments),
        options=ReadOptions(arguments.template, arguments.max_record_bytes),
        part_bytes=arguments.part_bytes,
        max_bad=arguments.max_bad,
        overwrite=arguments.overwrite,
        plain_tokenizer=arguments.plain_tokenizer,
    )
    store, elapsed_s = Store(prefix), time.monotonic() - started
    speeds = rate(counts.documents / elapsed_s, "documents"), rate(counts.input_bytes / elapsed_s, "bytes")
    print(
        f"{'multimodal' if store.multimodal else 'text'} dataset {prefix}: {counts.documents:,} documents, "
        f"{' and '.join(speeds)} of input in {elapsed_s:.1f} s"
    )
    print(
        f"  {counts.tokens:,} tokens ({store.dtype}, end-of-sequence included), {counts.images:,} images"
        + f" ({size(counts.image_bytes)}, {rate(counts.image_bytes / elapsed_s, 'bytes')})" * (counts.images > 0)
    )
    if counts.reused_bytes:
        print(f"  {counts.reused_bytes / counts.input_bytes:.0%} of the input was done already by an earlier run")
    if counts.rejected:
        print(f"  {counts.rejected:,} bad records were left out: {prefix}.rejected.jsonl")
    for backend in counts.backends[:_BACKENDS]:
        print(f"  tokenizer: {backend}")
    if len(counts.backends) > _BACKENDS:
        print(f"  and {len(counts.backends) - _BACKENDS} other reasons to do without gigatoken in a shard")
    for path in store.paths:
        print(f"  {path}  {os.path.getsize(path):,} bytes")


def engine(arguments: argparse.Namespace) -> Engine:
    """What `--engine` names."""
    if arguments.engine == "local":
        return partial(local.run, workers=arguments.workers)
    try:
        from megavl.data.engines import ray
    except ImportError as error:
        raise DataError(f"--engine ray needs the package ray ({error}); pip install 'megavl[ray]'") from error
    return partial(ray.run, workers=arguments.workers, address=arguments.ray_address)


if __name__ == "__main__":
    sys.exit(main())
