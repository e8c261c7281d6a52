"""Documents to an indexed dataset: .jsonl files in, PREFIX.bin, PREFIX.idx and PREFIX.meta out.

    python tools/preprocess_data.py --input A.jsonl [B.jsonl ...] --output-prefix P --tokenizer T.model|tokenizer.json

A record is {"text": "..."} or {"segments": [{"text": "..."}, {"image": "relative/path.png"}, ...]}, with an optional
"id". The dataset is multimodal if any record holds an image, and text otherwise. See docs/data.md.
"""

import argparse
import os
import signal
import sys
import time
from pathlib import Path

from megavl.data.build import Progress, build
from megavl.data.errors import DataError
from megavl.data.output import refuse_existing
from megavl.data.store import Store


class ProgressLine:
    """One line on standard error, rewritten on a terminal and repeated rarely elsewhere."""

    def __init__(self, input_bytes: int) -> None:
        self._input_bytes = input_bytes
        self._start = time.monotonic()
        self._terminal = sys.stderr.isatty()
        self._next = 0.0 if self._terminal else 10.0

    def __call__(self, progress: Progress) -> None:
        if self.elapsed_s >= self._next:
            self._next = self.elapsed_s + (0.2 if self._terminal else 10.0)
            done = progress.input_bytes / self._input_bytes
            print(
                f"{done:4.0%}  {self.speed(progress)}",
                end="\r" if self._terminal else "\n",
                file=sys.stderr,
                flush=True,
            )

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self._start

    def speed(self, progress: Progress) -> str:
        read_bytes = progress.input_bytes + progress.image_bytes
        return (
            f"{progress.documents:,} documents, {progress.documents / self.elapsed_s:,.0f} documents/s, "
            f"{read_bytes / self.elapsed_s / 1e6:,.1f} MB/s"
        )


def main() -> int:
    arguments = parse_arguments()
    # A polite kill unwinds like Ctrl-C, so that it leaves nothing behind either.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        run(arguments)
    except (DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", nargs="+", required=True, metavar="FILE", help=".jsonl files, read in this order")
    parser.add_argument("--output-prefix", required=True, metavar="P", help="writes P.bin, P.idx and P.meta")
    parser.add_argument("--tokenizer", required=True, metavar="T", help="sentencepiece .model or tokenizer.json")
    parser.add_argument(
        "--workers", type=int, default=1, metavar="N", help="processes; the output does not depend on it (default 1)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing dataset of that prefix")
    arguments = parser.parse_args()
    if arguments.workers < 1:
        parser.error(f"--workers {arguments.workers}: at least 1")
    return arguments


def run(arguments: argparse.Namespace) -> None:
    """Build the dataset and say what was written."""
    if not arguments.overwrite:
        refuse_existing(arguments.output_prefix)
    line = ProgressLine(sum(os.path.getsize(path) for path in arguments.input))
    progress = build(
        arguments.input,
        arguments.output_prefix,
        arguments.tokenizer,
        arguments.workers,
        arguments.overwrite,
        line,
    )
    store = Store(arguments.output_prefix)
    kind = "multimodal" if store.multimodal else "text"
    print(f"{kind} dataset {arguments.output_prefix}: {line.speed(progress)} in {line.elapsed_s:.1f} s")
    print(
        f"  {progress.tokens:,} tokens ({store.dtype}, end-of-sequence included), {progress.images:,} images "
        f"({progress.image_bytes / 1e6:,.1f} MB)"
    )
    for suffix in ("bin", "idx", "meta"):
        path = Path(f"{arguments.output_prefix}.{suffix}")
        print(f"  {path}  {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    sys.exit(main())
