"""Damaged input for every reader: a small file of each format, changed at random, is documents or a DataError.

    python -m tests.data.readers.fuzz --inputs 100000 --seed 1

A crash ends the process, a hang or a wrong exception is printed with the seed of its input; memory is printed at the
end. The test in test_fuzz.py runs a little of it.
"""

import argparse
import base64
import gzip
import io
import json
import random
import resource
import sys
import tarfile
import tempfile
import time
import zipfile
from pathlib import Path

import pyarrow as pa
from pyarrow import ipc, parquet

from megavl.data.document import Document
from megavl.data.errors import DataError
from megavl.data.readers.reader import ReadOptions
from megavl.data.readers.registry import reader_of

PICTURE = base64.b64decode("R0lGODlhAQABAIAAAP///wAAACwAAAAAAQABAAACAkQBADs=")
RECORDS = [
    {"id": 1, "text": "one é \U0001d11e"},
    {"segments": [{"text": "two"}, {"image": "a.gif"}, {"token": "<|ref|>", "supervised": False}]},
    {"image": "a.gif", "conversations": [{"from": "human", "value": "<image>q"}, {"from": "gpt", "value": "a"}]},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, {"role": "assistant", "content": "a"}]},
    {"text_list": ["a", "b"], "image_info": [{"image_name": "a.gif", "matched_text_index": 1}]},
    {"texts": ["a", None], "images": [None, "a.gif"]},
    {"image": "a.gif", "grounding": [{"query": "cat", "boxes": [[0, 0.0, 1, 0.5]]}]},
    {"image": "a.gif", "question": "q", "grounding": [{"text": "a "}, {"query": "cat", "boxes": []}]},
    {"texts": [{"user": "q", "assistant": "a"}], "images": ["a.gif"]},
]
LINES = b"".join(json.dumps(record, ensure_ascii=False).encode() + b"\n" for record in RECORDS)
ARRAY = json.dumps(RECORDS, ensure_ascii=False, indent=1).encode()
PAGE = b"<!doctype html><h1>T</h1><p>words <img src=a.gif alt=x> &amp; <table><tr><td>1</table><script>x</script>"
CELLS = [
    {"cell_type": "markdown", "metadata": {}, "source": ["# T\n"]},
    {
        "cell_type": "code",
        "metadata": {},
        "source": "plot()",
        "outputs": [{"output_type": "display_data", "data": {"image/png": base64.b64encode(PICTURE).decode()}}],
    },
]


def table(form: str) -> bytes:
    """The records that a table can hold, some rows to a group."""
    rows = pa.Table.from_pylist(
        [
            {"text": "one", "image": {"bytes": PICTURE, "path": None}, "id": 1},
            {"text": "two é", "image": None, "id": 2},
            {"text": None, "segments": [{"text": "a"}, {"text": "b"}]},
        ]
        * 3
    )
    file = io.BytesIO()
    if form == "parquet":
        parquet.write_table(rows, file, row_group_size=4)
    else:
        with (ipc.new_stream if form == "stream" else ipc.new_file)(file, rows.schema) as writer:
            writer.write_table(rows, max_chunksize=4)
    return file.getvalue()


def archive() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, data in (
            ("0.gif", PICTURE),
            ("0.txt", b"caption"),
            ("x" * 120 + ".json", json.dumps(RECORDS[0]).encode()),
            ("1.gif", PICTURE),
            ("1.json", b'{"caption": "c"}'),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


def book() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as epub:
        epub.writestr(
            "META-INF/container.xml",
            '<container xmlns="urn:oasis:names:tc:opendocument:xmlns:container"><rootfiles>'
            '<rootfile full-path="b.opf" media-type="application/oebps-package+xml"/></rootfiles></container>',
        )
        epub.writestr(
            "b.opf",
            '<package xmlns="http://www.idpf.org/2007/opf"><manifest><item id="c" href="c.xhtml" '
            'media-type="application/xhtml+xml"/></manifest><spine><itemref idref="c"/></spine></package>',
        )
        epub.writestr("c.xhtml", '<html xmlns="http://www.w3.org/1999/xhtml"><body><p>w</p></body></html>')
        epub.writestr("a.gif", PICTURE)
    return file.getvalue()


SEEDS = {
    "a.jsonl": LINES,
    "a.jsonl.gz": gzip.compress(LINES, mtime=0),
    "a.json": ARRAY,
    "a.parquet": table("parquet"),
    "stream.arrow": table("stream"),
    "file.arrow": table("file"),
    "a.tar": archive(),
    "a.tgz": gzip.compress(archive(), mtime=0),
    "a.html": PAGE,
    "a.ipynb": json.dumps({"nbformat": 4, "metadata": {}, "cells": CELLS}).encode(),
    "a.epub": book(),
}
PIECES = [
    b"\0",
    b"\xff",
    b'"',
    b"\\",
    b"{",
    b"[",
    b"]",
    b"null",
    b"-1",
    b"9" * 30,
    b"\\ud800",
    b"<image>",
    b"../",
    b"/",
]


def damaged(data: bytes, chance: random.Random) -> bytes:
    """The bytes after one to eight changes: bits, cuts, copies and insertions, mostly small."""
    changed = bytearray(data)
    for _ in range(chance.choice((1, 1, 1, 2, 3, 8))):
        start = chance.randrange(len(changed) + 1)
        stop = min(len(changed), start + chance.choice((1, 2, 4, 8, 64, 512)))
        match chance.randrange(6):
            case 0 if start < len(changed):
                changed[start] ^= 1 << chance.randrange(8)
            case 1:
                changed[start:stop] = chance.randbytes(stop - start)
            case 2:
                del changed[start:stop]
            case 3:
                changed[start:start] = changed[start:stop]
            case 4:
                changed[start:start] = chance.choice(PIECES)
            case 5 if chance.random() < 0.2:
                del changed[start:]
    return bytes(changed)


def check(path: Path, part_bytes: int) -> int:
    """Read all of a file, or as far as it goes: the number of its documents. Raises AssertionError for what a reader
    must not yield, and whatever else than DataError it raises."""
    found = 0
    options = ReadOptions(max_record_bytes=1 << 20)
    reader = reader_of(str(path))
    try:
        for part in reader.split(str(path), part_bytes):
            for document in reader.read(part, options):
                assert isinstance(document, Document | DataError), document
                if isinstance(document, Document):
                    assert document.segments and document.key
                    document.key.encode("utf-8")
                    found += 1
    except DataError as error:
        assert str(error).startswith(str(path)), error
    return found


def fuzz(folder: Path, name: str, seed: int) -> None:
    """One input: the file `name` of SEEDS, damaged as the seed has it."""
    chance = random.Random(f"{name} {seed}")
    path = folder / name
    path.write_bytes(damaged(SEEDS[name], chance))
    check(path, chance.choice((1, 100, 1 << 20)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=100_000, help="of all formats together")
    parser.add_argument("--seed", type=int, default=0, help="of the first input")
    arguments = parser.parse_args()
    start, slowest, failures = time.monotonic(), (0.0, ""), 0
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "a.gif").write_bytes(PICTURE)
        for number in range(arguments.inputs):
            name, seed = list(SEEDS)[number % len(SEEDS)], arguments.seed + number // len(SEEDS)
            began = time.monotonic()
            try:
                fuzz(Path(folder), name, seed)
            except Exception as error:  # whatever it is, it is what was looked for
                failures += 1
                print(f"{name}, seed {seed}: {type(error).__name__}: {str(error)[:300]}", file=sys.stderr)
            slowest = max(slowest, (time.monotonic() - began, f"{name}, seed {seed}"))
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        f"{arguments.inputs:,} inputs in {time.monotonic() - start:.0f} s, {failures} failures, slowest "
        f"{slowest[0]:.2f} s ({slowest[1]}), at most {memory:.0f} MiB"
    )
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
