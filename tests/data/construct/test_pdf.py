import io
import string

import pytest
from PIL import Image

from megavl.data.construct.pdf import Pdf
from megavl.data.construct.sample import Dropped

LETTERS = string.ascii_letters + string.digits


def write(path, pages, size=(400, 300), trailer=""):
    """A PDF of Helvetica text; a page is its lines, each at its height."""
    objects = ["<< /Type /Catalog /Pages 2 0 R >>"]
    kids = " ".join(f"{4 + 2 * number} 0 R" for number in range(len(pages)))
    objects.append(f"<< /Type /Pages /Kids [{kids}] /Count {len(pages)} >>")
    objects.append("<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>")
    for number, lines in enumerate(pages):
        content = " ".join(f"BT /F 10 Tf 10 {height} Td ({text}) Tj ET" for height, text in lines.items())
        objects.append(
            f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 {size[0]} {size[1]}] /Contents {5 + 2 * number} 0 R "
            "/Resources << /Font << /F 3 0 R >> >> >>"
        )
        objects.append(f"<< /Length {len(content)} >> stream\n{content}\nendstream")
    data, offsets = b"%PDF-1.4\n", []
    for number, value in enumerate(objects, start=1):
        offsets.append(len(data))
        data += f"{number} 0 obj {value} endobj\n".encode("latin-1")
    table = "".join(f"{offset:010} 00000 n \n" for offset in offsets)
    data += (
        f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n{table}trailer << /Size {len(objects) + 1} /Root 1 0 R "
        f"{trailer} >>\nstartxref\n{len(data)}\n%%EOF"
    ).encode("latin-1")
    path.write_bytes(data)
    return str(path)


def test_a_page_is_its_picture_and_its_visible_text(tmp_path):
    path = write(
        tmp_path / "a.pdf", [{280: "First line", 260: LETTERS[:30], 400: "outside of the page"}, {20: LETTERS}]
    )
    first, second = Pdf(dpi=144, min_chars=30).samples([path])
    assert (first.key, second.key) == (f"{path}:1", f"{path}:2")
    assert first.text == f"First line\n{LETTERS[:30]}"
    assert second.text == LETTERS
    tops = []
    for sample in (first, second):
        picture = Image.open(io.BytesIO(sample.image)).convert("L")
        assert picture.size == (800, 600)
        tops.append(picture.point(lambda value: 255 * (value < 128)).getbbox()[1])
    # PDF's heights are from the bottom: the first page's text begins near the top, the second's near the bottom.
    assert tops[0] < 30 and tops[1] > 530


@pytest.mark.parametrize(
    ("lines", "reason", "detail"),
    [
        ({}, "no text layer", ""),
        ({20: "   "}, "no text layer", ""),
        ({20: "short text"}, "fewer than 50 characters", "9"),
    ],
)
def test_pages_without_enough_text_are_dropped(tmp_path, lines, reason, detail):
    path = write(tmp_path / "a.pdf", [lines, {20: LETTERS}])
    dropped, sample = Pdf().samples([path])
    assert dropped == Dropped(f"{path}:1", reason, detail)
    assert sample.key == f"{path}:2"


def test_a_page_of_absurd_size_is_not_rendered(tmp_path):
    path = write(tmp_path / "a.pdf", [{20: LETTERS}], size=(14400, 14400))
    assert list(Pdf().samples([path])) == [Dropped(f"{path}:1", "more than 50,000,000 pixels", "28800 x 28800")]


def test_files_that_cannot_be_read_are_dropped(tmp_path):
    encryption = f"/Encrypt << /Filter /Standard /V 1 /R 2 /O <{'00' * 32}> /U <{'11' * 32}> /P -4 >> /ID [<00> <00>]"
    locked = write(tmp_path / "locked.pdf", [{20: LETTERS}], trailer=encryption)
    (tmp_path / "damaged.pdf").write_bytes(b"%PDF-1.4 cut")
    found = Pdf().samples([locked, str(tmp_path / "damaged.pdf"), str(tmp_path / "absent.pdf")])
    assert [(drop.where, drop.reason) for drop in found] == [
        (locked, "encrypted"),
        (str(tmp_path / "damaged.pdf"), "damaged"),
        (str(tmp_path / "absent.pdf"), "cannot be read"),
    ]
