import gzip
import io
import json
import tarfile

import pyarrow as pa
import pytest

from megavl.data.document import Document, Image, Text
from megavl.data.errors import DataError
from tests.data.readers.reading import PICTURE, documents, read


def shard(path, *members: tuple[str, object] | tarfile.TarInfo):
    """A tar of (name, content), where an object is written as JSON, and of members of other kinds."""
    with tarfile.open(path, "w") as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
                continue
            name, content = member
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def member(name: str, kind: bytes) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, "/etc/passwd"
    return info


def test_text_beside_images_and_json_as_metadata(tmp_path):
    path = shard(
        tmp_path / "a.tar",
        member("part", tarfile.DIRTYPE),
        ("part/000.jpg", PICTURE),
        ("part/000.txt", b"A caption.\n"),
        ("part/000.json", {"caption": "not this one", "text": "nor this"}),
        ("part/000.cls", b"3"),
        ("README", b"no sample"),
        ("part/._001.jpg", b"of a file system"),
        ("./part/001.0.PNG", b"0"),
        ("./part/001.1.webp", b"1"),
        ("./part/001.txt", "zwei Bilder: ä".encode()),
        ("002.txt", b"words alone"),
    )
    assert documents(path) == [
        Document("part/000", str(path), (Image(PICTURE, "part/000.jpg"), Text("A caption."))),
        Document(
            "part/001",
            str(path),
            (Image(b"0", "./part/001.0.PNG"), Image(b"1", "./part/001.1.webp"), Text("zwei Bilder: ä")),
        ),
        Document("002", str(path), (Text("words alone"),)),
    ]


def test_json_names_images_by_member_by_file_name_and_by_extension_or_not_at_all(tmp_path):
    talk = [{"from": "human", "value": "What?<image>"}, {"from": "gpt", "value": "That."}]
    path = shard(
        tmp_path / "a.tar",
        ("f/a.x.png", b"x"),
        ("f/a.y.png", b"y"),
        ("f/a.z.png", b"z"),
        ("f/a.json", {"segments": [{"image": "y.png"}, {"image": "f/a.x.png"}, {"text": "t"}, {"image": "a.z.png"}]}),
        ("b.json", {"id": "named", "conversations": talk}),
        ("b.jpg", b"jpg"),
        ("c.jpg", b"jpg"),
        ("c.json", {"caption": "as img2dataset writes it", "url": "https://example.org/c.jpg", "key": "c"}),
    )
    first, second, third = documents(path, template="plain")
    assert [getattr(segment, "data", None) for segment in first.segments] == [b"y", b"x", None, b"z"]
    said = (Text("What?", False), Image(b"jpg", "b.jpg"), Text("That."))
    assert second == Document("named", str(path), said, "plain")
    assert third.segments == (Image(b"jpg", "c.jpg"), Text("as img2dataset writes it"))


@pytest.mark.parametrize("name", ["a.tar.gz", "a.tgz", "a.tar.zst"])
def test_compressed_archives(tmp_path, name):
    plain = shard(tmp_path / "a.tar", *((f"{n}.{e}", b"x" * 100_000) for n in range(5) for e in ("jpg", "txt")))
    path = tmp_path / name
    with pa.CompressedOutputStream(str(path), "zstd" if name.endswith("zst") else "gzip") as file:
        file.write(plain.read_bytes())
    assert [document.segments for document in documents(path)] == [d.segments for d in documents(plain)]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([member("b.jpg", tarfile.SYMTYPE)], "its member b.jpg is a symbolic link"),
        ([member("b.jpg", tarfile.LNKTYPE)], "is a hard link"),
        ([member("b.jpg", tarfile.BLKTYPE)], "is a device"),
        ([("/b.jpg", PICTURE)], "its member /b.jpg has a name that leads out of the archive"),
        ([("x/../../b.jpg", PICTURE)], "leads out of the archive"),
        ([("../b", PICTURE)], "leads out of the archive"),
        ([("b.jpg", PICTURE), ("b.jpg", PICTURE)], "its member b.jpg is there twice"),
        ([("b.jpg", PICTURE), ("b.a.txt", b"x"), ("b.b.txt", b"y")], "has more than one .txt"),
        ([("a.txt", b"again")], "sample a: is there twice"),
        ([("b.jpg", PICTURE)], r"has neither a .txt nor a .json \(its members: b.jpg"),
        ([("b.jpg", bytes(2000)), ("b.txt", b"x")], "larger than --max-record-bytes 1,000"),
        ([("b.jpg", bytes(600)), ("b.txt", b"x" * 600)], "larger than --max-record-bytes 1,000"),
        ([("b.txt", b"\xff")], "its .txt is not UTF-8"),
        ([("b.txt", b" \n")], '"text" is empty'),
        ([("b.json", b"{")], "is not JSON"),
        ([("b.json", [1])], "is a list"),
        ([("b.json", {"url": "x"})], "no key of a layout"),
        (
            [("b.json", {"image": "c.jpg", "text": "x"}), ("b.jpg", PICTURE)],
            "c.jpg is no image of the sample, which has b.jpg",
        ),
        ([("b.json", {"image": "../a.jpg", "text": "x"})], "is no image of the sample, which has none"),
        ([("b.json", {"segments": [{"text": "x"}]}), ("b.jpg", PICTURE)], "its .json does not name b.jpg"),
        ([("\udcff.txt", b"x")], '"key" holds half of a surrogate pair'),
    ],
)
def test_a_malformed_sample_is_named_and_the_rest_goes_on(tmp_path, members, message):
    path = shard(tmp_path / "x.tar", ("a.txt", b"first"), ("n.txt", b"between"), *members, ("z.txt", b"last"))
    first, _, error, last = read(path, max_record_bytes=1000)
    assert (first.segments, last.segments) == ((Text("first"),), (Text("last"),))
    with pytest.raises(DataError, match=message):
        raise error
    assert str(error).startswith(f"{path}:3: sample ")


def test_damage_ends_the_file_with_its_name(tmp_path):
    plain = shard(tmp_path / "a.tar", ("a.txt", b"first"), ("b.txt", b"x" * 5000))
    plain.write_bytes(plain.read_bytes()[:3000])
    packed = tmp_path / "b.tar.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes())[:-10])
    for path in (plain, packed):
        with pytest.raises(DataError, match=rf"{path}:\d: the file cannot be read further: .*; make it again"):
            read(path)
