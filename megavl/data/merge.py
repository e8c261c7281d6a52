"""Merge: several datasets to one, in order. Files are put end to end and indexes added up; no token is looked at."""

import errno
import os
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import BinaryIO

import numpy as np

from megavl.data.checksum import PartHash
from megavl.data.errors import DataError
from megavl.data.format import Paths, token_dtype
from megavl.data.index import IndexWriter
from megavl.data.meta import Meta, write_meta
from megavl.data.output import new_dataset, refuse_existing
from megavl.data.progress import ProgressBar
from megavl.data.store import Store
from megavl.data.template import OF_A_FAMILY
from megavl.data.writer import widened

# What the kernel is asked to copy at a time: progress is reported in between.
_COPY_BYTES = 1 << 28
_BLOCK_BYTES = 1 << 20
# File systems that cannot copy inside the kernel, between them or at all.
_CANNOT_COPY = (errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP)


def merge(
    prefixes: Sequence[str],
    prefix: str,
    overwrite: bool = False,
    consume: bool = False,
) -> tuple[str, ...]:
    """Write the documents of some datasets, in order, as one. It has modes if any of them has.

    The .bin files are copied by the kernel, on file systems that can do so without copying; their checksums are taken
    over. An index is checked before it becomes part of a new one.

    Args:
        prefixes: at least one; a dataset may come more than once.
        consume: the inputs are no longer needed, so that the files of a single one are renamed.

    Returns:
        Inputs whose elements became wider (uint16 to int32), because others hold images or prompts.

    Raises:
        DataError: an input is damaged, inputs were made with different tokenizers or hold conversations of both model
            families, or the output exists and `overwrite` is false; nothing is left behind.
    """
    if not overwrite:
        refuse_existing(prefix)
    metas = [Store(one).meta for one in prefixes]
    for one, meta in zip(prefixes, metas, strict=True):
        if other := meta.other_tokenizer(prefixes[0], metas[0].tokenizer, metas[0].vocab_size):
            raise DataError(f"dataset {one} {other}; one id would mean two words; make them again with one tokenizer")
    _refuse_two_families(prefixes, metas)
    with new_dataset(prefix) as temporary:
        if consume and len(prefixes) == 1:
            for old, new in zip(Store(prefixes[0]).paths, temporary, strict=True):
                os.replace(old, new)
            return ()
        stored = sum(size_bytes for meta in metas for size_bytes, _ in meta.bin_parts)
        with ProgressBar("merging", stored, "bytes") as bar:
            return _write(prefixes, metas, temporary, bar)


def _refuse_two_families(prefixes: Sequence[str], metas: Sequence[Meta]) -> None:
    holders = {
        template: one
        for one, meta in zip(prefixes, metas, strict=True)
        for template in set(meta.templates) & set(OF_A_FAMILY)
    }
    if len(holders) > 1:
        (template, one), (other_template, other) = holders.items()
        raise DataError(
            f"dataset {one} holds conversations of the template {template}, and {other} of {other_template}; each is "
            "read by the models of its own family alone, so none could train on both; keep them apart, or make them "
            "again with one --template"
        )


def _write(prefixes: Sequence[str], metas: Sequence[Meta], paths: Paths, bar: ProgressBar) -> tuple[str, ...]:
    multimodal = any(meta.multimodal for meta in metas)
    dtype = token_dtype(metas[0].vocab_size, multimodal)
    bin_parts: list[tuple[int, str]] = []
    narrow: list[str] = []
    with IndexWriter(Path(paths.idx).parent) as index, open(paths.bin, "wb") as sink:
        for one in prefixes:
            store = Store(one)
            # A damaged index would get a checksum that fits it.
            idx, *parts = store.checksums()
            idx.check()
            for columns in store.blocks():
                index.append(*columns)
            with open(store.paths.bin, "rb", buffering=0) as source:
                if store.dtype == dtype:
                    _copy(source, sink, bar)
                    bin_parts += store.meta.bin_parts
                else:
                    narrow.append(one)
                    # And so would damaged tokens that are written anew.
                    for part in parts:
                        part.check()
                    bin_parts += _widen(source, store.dtype, sink, dtype, bar)
        idx_sha256 = index.write(paths.idx, dtype, multimodal)
    meta = replace(
        metas[0],
        templates=tuple(sorted(set().union(*(meta.templates for meta in metas)))),
        multimodal=multimodal,
        images=sum(meta.images for meta in metas),
        bin_parts=tuple(bin_parts),
        idx_sha256=idx_sha256,
        row_parts=tuple(chain.from_iterable(meta.row_parts for meta in metas)),
    )
    write_meta(paths.meta, meta, chain.from_iterable(Store(one).batches() for one in prefixes))
    return tuple(narrow)


def _copy(source: BinaryIO, sink: BinaryIO, bar: ProgressBar) -> None:
    """All of `source` behind what is in `sink`."""
    sink.flush()
    try:
        while copied := os.copy_file_range(source.fileno(), sink.fileno(), _COPY_BYTES):
            bar.advance(copied)
    except OSError as error:
        if error.errno not in _CANNOT_COPY:
            raise
        # Both files stand where the kernel left off.
        while block := source.read(_BLOCK_BYTES):
            sink.write(block)
            bar.advance(len(block))


def _widen(
    source: BinaryIO, narrow: np.dtype, sink: BinaryIO, wide: np.dtype, bar: ProgressBar
) -> list[tuple[int, str]]:
    """Write the elements in a wider type; (bytes, sha256) of the parts that this gives."""
    digest = PartHash()
    for elements in widened(source, narrow, wide):
        sink.write(elements)
        digest.update(elements)
        bar.advance(len(elements) * narrow.itemsize)
    return digest.parts()
