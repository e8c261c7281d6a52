import zipfile

import pytest

from megavl.data.document import Image, Text
from megavl.data.errors import DataError
from tests.data.conftest import image_bytes
from tests.data.readers.reading import read

PNG = image_bytes(0, (4, 3))
CONTAINER = (
    '<?xml version="1.0"?><container xmlns="urn:oasis:names:tc:opendocument:xmlns:container" version="1.0"><rootfiles>'
    '<rootfile full-path="OPS/book.opf" media-type="application/oebps-package+xml"/></rootfiles></container>'
)
XHTML = '<?xml version="1.0" encoding="utf-8"?><html xmlns="http://www.w3.org/1999/xhtml"><head><title/></head><body>{}</body></html>'


def write(path, chapters, files=(), spine=""):
    """A book of the chapters, whose files are OPS/text/1.xhtml and so on."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("mimetype", "application/epub+zip")
        archive.writestr("META-INF/container.xml", CONTAINER)
        items = "".join(
            f'<item id="c{n}" href="text/{n}.xhtml" media-type="application/xhtml+xml"/>'
            for n in range(1, len(chapters) + 1)
        )
        spine = spine or "".join(f'<itemref idref="c{n}"/>' for n in range(1, len(chapters) + 1))
        archive.writestr(
            "OPS/book.opf",
            f'<package xmlns="http://www.idpf.org/2007/opf"><manifest>{items}<item id="toc" href="nav.xhtml" '
            f'properties="nav" media-type="application/xhtml+xml"/></manifest><spine>{spine}</spine></package>',
        )
        archive.writestr("OPS/nav.xhtml", XHTML.format("<nav>Contents</nav> toc"))
        for number, chapter in enumerate(chapters, start=1):
            archive.writestr(f"OPS/text/{number}.xhtml", chapter)
        for name, data in dict(files).items():
            archive.writestr(name, data)
    return path


def test_chapters_come_in_the_order_of_the_spine(tmp_path):
    link = 'xmlns:xlink="http://www.w3.org/1999/xlink"'
    cover = f'<svg xmlns="http://www.w3.org/2000/svg" {link}><image xlink:href="../a.png"/></svg>'
    chapters = [
        XHTML.format("<script src='x.js'/><h1>One</h1><p>a&nbsp;b &amp; c<img src='../a%2Epng'/></p><a id='x'/>d"),
        XHTML.format("<p>Two"),  # not well-formed
        XHTML.format("<p> </p>"),
        XHTML.format("<p>skipped</p>"),
        XHTML.format(cover),
    ]
    spine = "".join(
        f'<itemref idref="{name}"{linear}/>'
        for name, linear in [
            ("c5", ""),
            ("toc", ""),
            ("c2", ""),
            ("c1", ' linear="yes"'),
            ("c3", ""),
            ("c4", ' linear="no"'),
        ]
    )
    documents = read(write(tmp_path / "b.epub", chapters, {"OPS/a.png": PNG}, spine))
    assert [(document.key, document.segments) for document in documents] == [
        ("b.epub:1", (Image(PNG, "../a.png"),)),
        ("b.epub:3", (Text("Two"),)),
        ("b.epub:4", (Text("One\n\na b & c"), Image(PNG, "../a.png"), Text("\n\nd"))),
    ]
    assert {document.source for document in documents} == {str(tmp_path / "b.epub")}


def test_a_bad_chapter_is_named_and_the_others_are_read(tmp_path):
    chapters = [
        XHTML.format("<img src='absent.png'/>"),
        b"<p>\xff</p>",
        XHTML.format("<img src='../../../../etc/passwd'/>"),
        "<p>x",
    ]
    errors = read(write(tmp_path / "b.epub", chapters))
    assert errors.pop().segments == (Text("x"),)
    assert all(isinstance(error, DataError) for error in errors)
    for number, message in enumerate(
        ("has no file OPS/text/absent.png", "is not text in utf-8", "has no file ../../etc/passwd"), 1
    ):
        assert str(errors[number - 1]).startswith(f"{tmp_path / 'b.epub'}:{number}: ") and message in str(
            errors[number - 1]
        )


def test_entities_are_not_expanded(tmp_path):
    laughs = "".join(f'<!ENTITY l{n} "{f"&l{n - 1};" * 10}">' for n in range(1, 10))
    chapter = f'<!DOCTYPE html [<!ENTITY l0 "lol">{laughs}<!ENTITY s SYSTEM "/etc/passwd">]><html>a&l9;b&s;c</html>'
    (error,) = read(write(tmp_path / "b.epub", [chapter]))
    assert str(error).startswith(f"{tmp_path / 'b.epub'}:1: declares entities of its own")
    path = tmp_path / "c.epub"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("META-INF/container.xml", chapter.replace("html", "container"))
    with pytest.raises(DataError, match="container.xml: is not well-formed"):
        read(path)


def test_a_book_that_would_unpack_to_too_much_is_refused(tmp_path):
    path = write(tmp_path / "b.epub", [XHTML.format("<p>a</p>")], {"OPS/zeros": b""})
    data = bytearray(path.read_bytes())
    entry = data.rindex(b"PK\1\2", 0, data.rindex(b"OPS/zeros"))
    data[entry + 24 : entry + 28] = (0xFFFFFFF0).to_bytes(4, "little")  # the size the directory declares for it
    path.write_bytes(data)
    with pytest.raises(DataError, match="would unpack to 4,29[0-9,]* bytes in 6 files"):
        read(path)


def test_a_file_is_unpacked_no_further_than_declared(tmp_path):
    path = write(tmp_path / "b.epub", [XHTML.format("<p>" + "a" * 100_000)])
    data = bytearray(path.read_bytes())
    entry = data.rindex(b"PK\1\2", 0, data.rindex(b"OPS/text/1.xhtml"))
    data[entry + 24 : entry + 28] = (200).to_bytes(4, "little")
    path.write_bytes(data)
    (error, *_) = read(path)
    assert "OPS/text/1.xhtml is damaged or encrypted" in str(error)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("META-INF/container.xml", "<container/>", "names no package file"),
        ("META-INF/container.xml", "<container", "is not well-formed XML"),
        ("OPS/book.opf", '<package><spine><itemref idref="x"/></spine></package>', "'x', which is not in the manifest"),
    ],
)
def test_a_damaged_book_is_named(tmp_path, name, data, message):
    path = tmp_path / "b.epub"
    with zipfile.ZipFile(path, "w") as archive:
        for file, text in ({"META-INF/container.xml": CONTAINER} | {name: data}).items():
            archive.writestr(file, text)
    with pytest.raises(DataError, match=message) as error:
        read(path)
    assert str(error.value).startswith(f"{path}: ")


def test_what_is_no_book_is_named(tmp_path):
    (tmp_path / "b.epub").write_bytes(b"PK\3\4 cut")
    with pytest.raises(DataError, match="is no EPUB, which is a zip archive"):
        read(tmp_path / "b.epub")
    with pytest.raises(DataError, match="absent.epub: cannot be read"):
        read(tmp_path / "absent.epub")
    (error,) = read(write(tmp_path / "empty.epub", [XHTML.format("")]))
    assert "no chapter holds text or an image" in str(error)
