"""Indexed datasets to one, in order: P1.bin, P1.idx, P1.meta, P2.bin, ... in, PREFIX.bin, PREFIX.idx, PREFIX.meta out.

    python tools/merge_data.py --input P1 P2 ... --output-prefix P

The datasets must be made with one tokenizer. No token is looked at, and none is copied where the file system can share
blocks between files. The inputs stay as they are.
"""

import argparse
import os
import signal
import sys

from megavl.data.errors import DataError
from megavl.data.merge import merge
from megavl.data.store import Store


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", nargs="+", required=True, metavar="P", help="prefixes of datasets, in this order")
    parser.add_argument("--output-prefix", required=True, metavar="P", help="writes P.bin, P.idx and P.meta")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing dataset of that prefix")
    arguments = parser.parse_args()
    # A polite kill unwinds like Ctrl-C, so that it leaves nothing behind either.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        widened = merge(arguments.input, arguments.output_prefix, arguments.overwrite)
    except (DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130
    store = Store(arguments.output_prefix)
    print(
        f"{'multimodal' if store.multimodal else 'text'} dataset {store.prefix}: {len(store):,} documents of "
        f"{len(arguments.input)} datasets, {store.meta.images:,} images"
    )
    for prefix in widened:
        print(f"  {prefix} was stored as uint16 and is int32 now, as others hold images or prompts")
    for path in store.paths:
        print(f"  {path}  {os.path.getsize(path):,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
