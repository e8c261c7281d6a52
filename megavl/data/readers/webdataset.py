"""Webdataset: tar archives in which the members with one name before its first dot are a sample. A sample is a record.

Its `.txt` is the text of its images. Without one its `.json` is a record of any layout, which names images by members
of the sample, or none: then it has all of them, in their order. Other members, and JSON beside text, are metadata.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from megavl.data.document import Document
from megavl.data.errors import DataError
from megavl.data.readers import json_object
from megavl.data.readers.files import open_input
from megavl.data.readers.reader import Part, ReadOptions, too_large, whole
from megavl.data.readers.record import Place, Record, to_document
from megavl.data.readers.tar import DIRECTORY, REGULAR, DamagedTar, Member, Tar
from megavl.data.template import TEMPLATES, Template

SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.zst")

_IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
_TEXTS = ("txt", "json")


def split(path: str, part_bytes: int) -> Iterator[Part]:
    """The archive as a whole: collections of this format come in many.

    Raises:
        DataError: the file cannot be read.
    """
    return whole(path)


def read(part: Part, options: ReadOptions) -> Iterator[Document | DataError]:
    """Documents of the archive's samples, numbered from 1; for a malformed one the error that names it.

    Raises:
        DataError: the archive or its compression is damaged.
    """
    template = TEMPLATES[options.template]
    number = 1
    try:
        with open_input(part.path) as file:
            for sample in _samples(Tar(file), options):
                place = Place(part.path, number)
                try:
                    yield _document(sample, place, template)
                except DataError as error:
                    yield place.refuse(DataError(f"sample {sample.key}: {error}"))
                number += 1
    except (DamagedTar, OSError) as error:
        raise DataError(f"{part.path}:{number}: the file cannot be read further: {error}; make it again") from error


@dataclass
class _Sample:
    """`images` and `texts` are contents, by member and by kind; a sample that `error` refuses keeps none."""

    key: str
    members: set[str] = field(default_factory=set)
    images: dict[str, bytes] = field(default_factory=dict)
    texts: dict[str, bytes] = field(default_factory=dict)
    size_bytes: int = 0
    error: DataError | None = None

    def refuse(self, error: DataError) -> None:
        self.images, self.texts, self.error = {}, {}, self.error or error


def _samples(archive: Tar, options: ReadOptions) -> Iterator[_Sample]:
    sample, seen = None, set()
    for member in archive:
        key, extension = _cut(member.name)
        if member.kind == DIRECTORY or (not extension and _is_safe(member)):
            continue
        if sample is None or sample.key != key:
            if sample:
                yield sample
            sample = _Sample(key)
            if key in seen:
                sample.refuse(
                    DataError("is there twice; members of a sample must be behind one another, and only once")
                )
            seen.add(key)
        try:
            _add(sample, member, extension, archive, options)
        except DataError as error:
            sample.refuse(error)
    if sample:
        yield sample


def _cut(name: str) -> tuple[str, str]:
    """(key, extension) of a member; no extension where the name has none, or begins with a dot."""
    folder, slash, base = name.removeprefix("./").rpartition("/")
    stem, _, extension = base.partition(".")
    return (folder + slash + stem, extension) if stem else (name, "")


def _is_safe(member: Member) -> bool:
    return member.kind == REGULAR and not member.name.startswith("/") and ".." not in member.name.split("/")


def _add(sample: _Sample, member: Member, extension: str, archive: Tar, options: ReadOptions) -> None:
    if not _is_safe(member):
        what = "has a name that leads out of the archive" if member.kind == REGULAR else f"is {member.kind}"
        raise DataError(f"its member {member.name} {what}; make the archive of regular files with relative names")
    if member.name in sample.members:
        raise DataError(f"its member {member.name} is there twice; give it once")
    sample.members.add(member.name)
    kind = extension.rpartition(".")[2].lower()
    if sample.error or kind not in _IMAGES + _TEXTS:
        return
    sample.size_bytes += member.size_bytes
    if sample.size_bytes > options.max_record_bytes:
        raise too_large(options)
    if kind in _IMAGES:
        sample.images[member.name] = archive.read()
    elif kind in sample.texts:
        raise DataError(f"has more than one .{kind} member; give one")
    else:
        sample.texts[kind] = archive.read()


def _document(sample: _Sample, place: Place, template: Template) -> Document:
    if sample.error:
        raise sample.error
    values = {"key": sample.key} | _values(sample)
    if values.get("image") is None and values.get("images") is None:
        values["images"] = list(sample.images)
    members = {alias: name for name in sample.images for alias in (name, name.rpartition("/")[2], _cut(name)[1])}
    used = set()

    def image(reference: str) -> bytes:
        if reference not in members:
            raise DataError(f"{reference} is no image of the sample, which has {', '.join(sample.images) or 'none'}")
        used.add(members[reference])
        return sample.images[members[reference]]

    document = to_document(Record(values, image, template), place)
    if unused := sample.images.keys() - used:
        raise DataError(f"its .json does not name {min(unused)}; name all images of the sample, or none")
    return document


def _values(sample: _Sample) -> dict[str, Any]:
    if "txt" in sample.texts:
        try:
            return {"text": sample.texts["txt"].decode("utf-8-sig").strip()}
        except UnicodeDecodeError as error:
            raise DataError(f"its .txt is not UTF-8 ({error.reason} at byte {error.start}); convert it") from error
    if "json" in sample.texts:
        return json_object.parse(sample.texts["json"])
    raise DataError(f"has neither a .txt nor a .json (its members: {', '.join(sorted(sample.members))[:200]})")
