import io
import tarfile

import pytest

from megavl.data.readers.tar import DIRECTORY, REGULAR, DamagedTar, Member, Tar


def archive(members: dict[str, bytes], form: int = tarfile.PAX_FORMAT) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


def read(data: bytes) -> list[tuple[str, bytes]]:
    tar = Tar(io.BytesIO(data))
    return [(member.name, tar.read()) for member in tar]


MEMBERS = {"a.txt": b"one", "é/" + "long" * 60 + ".jpg": bytes(600), "b/" * 40 + "c.png": b"", "d": b"x" * 512}


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_of_every_format_come_with_their_names_and_contents(form):
    members = {name: data for name, data in MEMBERS.items() if len(name) < 100 or form != tarfile.USTAR_FORMAT}
    assert read(archive(members, form)) == list(members.items())


def test_contents_may_be_left_and_archives_may_be_joined():
    both = archive(MEMBERS) + archive({"last": b"data"})
    tar = Tar(io.BytesIO(both))
    assert [tar.read() for member in tar if member.name == "last"] == [b"data"]


def test_kinds_other_than_files_have_no_content():
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for kind in (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE):
            info = tarfile.TarInfo("name")
            info.type, info.linkname = kind, "target"
            tar.addfile(info)
    kinds = [member.kind for member in Tar(io.BytesIO(file.getvalue()))]
    assert kinds == [DIRECTORY, "a symbolic link", "a hard link", "a device", "a pipe"]


def test_sizes_beyond_octal_digits():
    header = bytearray(archive({"a": b""})[:512])
    header[124:136] = b"\x80" + (1 << 40).to_bytes(11, "big")
    header[148:156] = b"%06o\0 " % (sum(header) - sum(header[148:156]) + 256)
    assert next(iter(Tar(io.BytesIO(bytes(header))))) == Member("a", REGULAR, 1 << 40)


def test_names_that_are_not_utf8_keep_their_bytes():
    assert read(archive({"\udcff.txt": b"x"}, tarfile.GNU_FORMAT)) == [("\udcff.txt", b"x")]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: b"no archive at all " * 100, "no header of a tar archive"),
        (lambda data: data[:1024], "before its end mark"),
        (lambda data: data[:700], "inside a member"),
        (lambda data: data[:512], "inside a member"),
        (lambda data: data[:100], "inside a header"),
        (lambda data: b"", "before its end mark"),
        (lambda data: data[:1024] + b"x" * 512 + data[1536:], "no header of a tar archive"),
        (lambda data: data[:148] + b"octal" + data[153:], r"no header of a tar archive \(b'octal"),
    ],
)
def test_damage(damage, message):
    with pytest.raises(DamagedTar, match=message):
        read(damage(archive({"a.txt": b"one", "b.txt": b"two"})))


@pytest.mark.parametrize("attribute", [b"x", b"9 path=ab", b"99 path=abc\n", b"0 =\n", b"-5 path=\n", b"10 size=x\n"])
def test_damaged_extended_headers(attribute):
    info = tarfile.TarInfo("h")
    info.type, info.size = tarfile.XHDTYPE, len(attribute)
    data = info.tobuf() + attribute.ljust(512, b"\0") + archive({"a.txt": b"one"})
    with pytest.raises(DamagedTar, match="extended header"):
        read(data)


def test_an_extended_header_is_not_held_whatever_its_size():
    info = tarfile.TarInfo("h")
    info.type, info.size = tarfile.XHDTYPE, 1 << 40
    with pytest.raises(DamagedTar, match="has 1,099,511,627,776 bytes"):
        read(info.tobuf(tarfile.GNU_FORMAT))
