"""Verify datasets: read every byte, check every entry, decode the images, and list everything that is wrong.

    python tools/verify_data.py PREFIX ... [--tokenizer T] [--images all|sample|none] [--workers N]

Exit code 1 where anything is damaged. Keys that several documents share are a warning. See docs/data.md.
"""

import argparse
import os
import sys

from rich.console import Console
from rich.text import Text

from megavl.data.errors import DataError
from megavl.data.inspect.terminal import printable
from megavl.data.progress import ProgressBar
from megavl.data.store import Store
from megavl.data.verify.found import Found
from megavl.data.verify.verify import verify, work_bytes

# What to do where a check found something.
REMEDIES = {
    "files": "copy or make the dataset again",
    "checksums": "copy the file again, or make the dataset again",
    "index": "tokens and images were not looked at; copy the .idx file again, or make the dataset again",
    "tokens": "make the dataset again with the tokenizer that its .meta file names",
    "images": "remove these documents or replace their images, and make the dataset again",
    "tokenizer": "give the tokenizer that made the dataset, or make the dataset again",
    "keys": "a warning: errors name documents by their keys, and these are not unique; documents may be there twice",
}
WARNINGS = {"keys"}


def main() -> int:
    arguments = parse_arguments()
    console = Console(highlight=False)
    findings: dict[str, dict[str, Found]] = {prefix: {} for prefix in arguments.prefixes}
    stores = []
    for prefix in findings:
        try:
            stores.append(Store(prefix))
        except (DataError, OSError) as error:
            findings[prefix]["files"] = Found(1, [str(error)])
    try:
        with ProgressBar("verifying", sum(map(work_bytes, stores)), "bytes") as bar:
            for store in stores:
                findings[store.prefix] |= verify(
                    store, arguments.tokenizer, arguments.images, arguments.workers, bar.advance
                )
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; nothing was decided", file=sys.stderr)
        return 130
    for prefix, found in findings.items():
        show(console, prefix, found, arguments.images)
    return int(any(errors(found) for found in findings.values()))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prefixes", nargs="+", metavar="PREFIX", help="datasets")
    parser.add_argument("--tokenizer", metavar="T", help="the one that made them, compared and tried on some documents")
    parser.add_argument(
        "--images", choices=("all", "sample", "none"), default="all", help="which to decode; sample: 1 document in 16"
    )
    parser.add_argument(
        "--workers", type=int, default=len(os.sched_getaffinity(0)), metavar="N", help="processes (one per core)"
    )
    arguments = parser.parse_args()
    if arguments.workers < 1:
        parser.error(f"--workers {arguments.workers}: at least 1")
    return arguments


def errors(found: dict[str, Found]) -> int:
    """How many things are wrong that make the dataset unfit."""
    return sum(one.count for check, one in found.items() if check not in WARNINGS)


def show(console: Console, prefix: str, findings: dict[str, Found], images: str) -> None:
    """The checks of a dataset in one line, then what is wrong."""
    damaged = errors(findings)
    verdict = f"{damaged:,} {'error' if damaged == 1 else 'errors'}" if damaged else "as it was written"
    console.print(Text.assemble((prefix, "bold"), ": ", (verdict, "red" if damaged else "green")), soft_wrap=True)
    names = {"images": {"all": "images", "sample": "images (1 document in 16)", "none": "images (not decoded)"}[images]}
    passed = [names.get(check, check) for check in REMEDIES if check in findings and not findings[check].count]
    if passed:
        console.print(f"  passed: {', '.join(passed)}", markup=False)
    for check, remedy in REMEDIES.items():
        found = findings.get(check, Found())
        if found.count:
            colour = "yellow" if check in WARNINGS else "red"
            console.print(Text.assemble("  ", (f"{check}: {found.count:,}", colour), f"; {remedy}"), soft_wrap=True)
            for message in found.messages:
                console.print(Text(f"    {printable(message)}"), soft_wrap=True)
            if found.count > len(found.messages):
                console.print(f"    and {found.count - len(found.messages):,} more", markup=False)


if __name__ == "__main__":
    sys.exit(main())
