"""Damaged datasets: files of a small one, changed at random, are read as far as they go or end in a DataError.

    python -m tests.data.fuzz_store --inputs 100000 --seed 1

A crash ends the process, a hang or a wrong exception is printed with the seed of its input; memory is printed at the
end. test_store.py runs a little of it.
"""

import argparse
import random
import resource
import sys
import tempfile
import time
from pathlib import Path

from megavl.data.encoded import EncodedDocument
from megavl.data.errors import DataError
from megavl.data.store import Store
from tests.data.conftest import encoded_text
from tests.data.readers.fuzz import damaged
from tests.data.stores import FILES, mixed, records, write


def seeds(folder: Path) -> dict[str, dict[str, bytes]]:
    """Files of a text dataset of two record batches, and of a multimodal one."""
    text = [EncodedDocument(f"k{number}", "s", (encoded_text(number),)) for number in range(3)]
    for name, items in (("text", text), ("mixed", mixed(3))):
        write(folder / name, items)
    return {
        name: {suffix: (folder / f"{name}.{suffix}").read_bytes() for suffix in FILES} for name in ("text", "mixed")
    }


def fuzz(folder: Path, files: dict[str, bytes], seed: int) -> bool:
    """One input: one of the files, damaged as the seed has it; whether it opened."""
    chance = random.Random(seed)
    hit = chance.choice(("idx", "idx", "meta", "meta", "bin"))
    for suffix, data in files.items():
        (folder / f"p.{suffix}").write_bytes(damaged(data, chance) if suffix == hit else data)
    try:
        store = Store(str(folder / "p"))
    except DataError:
        return False
    for read in (records, Store.verify):
        try:
            read(store)
        except DataError as error:
            assert str(folder / "p") in str(error), error
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0, help="of the first input")
    arguments = parser.parse_args()
    start, slowest, failures, opened = time.monotonic(), 0.0, 0, 0
    with tempfile.TemporaryDirectory() as folder:
        kinds = list(seeds(Path(folder)).values())
        for seed in range(arguments.seed, arguments.seed + arguments.inputs):
            began = time.monotonic()
            try:
                opened += fuzz(Path(folder), kinds[seed % len(kinds)], seed)
            except Exception as error:  # whatever is not a DataError is what is looked for
                failures += 1
                print(f"seed {seed}: {type(error).__name__}: {error}")
            slowest = max(slowest, time.monotonic() - began)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        f"{arguments.inputs} inputs in {time.monotonic() - start:.0f} s: {failures} failures, {opened} opened, slowest "
        f"{slowest:.2f} s, peak memory {memory:.0f} MiB"
    )
    return min(failures, 1)


if __name__ == "__main__":
    sys.exit(main())
