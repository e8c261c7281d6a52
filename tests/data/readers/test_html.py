import base64

import pytest

from megavl.data.document import Image, Text
from megavl.data.errors import DataError
from tests.data.conftest import image_bytes
from tests.data.readers import reading

PNG = image_bytes(0, (4, 3))


def document(path, **options):
    (found,) = reading.read(path, **options)
    return found


def page(tmp_path, markup, **files):
    for name, data in files.items():
        (tmp_path / f"{name}.png").write_bytes(data)
    path = tmp_path / "page.html"
    path.write_bytes(markup if isinstance(markup, bytes) else markup.encode())
    return path


def text(tmp_path, markup):
    (segment,) = document(page(tmp_path, markup)).segments
    return segment.text


def test_text_and_images_come_in_reading_order(tmp_path):
    (tmp_path / "a b").mkdir()
    (tmp_path / "a b" / "1.png").write_bytes(PNG)
    path = page(
        tmp_path,
        "<!doctype html><title>No</title><h1>How to fold</h1><p>Take <b>a</b>\n sheet: <img src='a%20b/1.png?v=2'> "
        f"as shown.</p><img src='data:image/png;base64,{base64.b64encode(PNG).decode()}'><p>End",
    )
    found = document(path)
    assert (found.key, found.source) == ("page.html", str(path))
    assert found.segments == (
        Text("How to fold\n\nTake a sheet: "),
        Image(PNG, "a b/1.png"),
        Text(" as shown.\n\n"),
        Image(PNG, "data:image/png"),
        Text("\n\nEnd"),
    )


@pytest.mark.parametrize(
    ("markup", "expected"),
    [
        ("a <b> b</b>\n\tc&nbsp; d", "a b c d"),
        ("<p>a</p> <p>b</p>c<div>d</div><div>e<br>f<br><br>g</div>", "a\n\nb\n\nc\nd\ne\nf\n\ng"),
        ("<h2>a</h2>b", "a\n\nb"),
        ("<ul><li>a</li><li><p>b</p><p>c</p></li><li></li></ul>d", "- a\n- b\n\n  c\n\nd"),
        ("<ol start=3><li>a<ul><li>b<li>c</ul><li>d</ol>", "3. a\n  - b\n  - c\n4. d"),
        (
            "<table><caption>t</caption><tr><th>a<th>b<tr><td>1<td><p>2</p><p>3</p><ul><li>4</ul></table>e",
            "t\na | b\n1 | 2 3 4\n\ne",
        ),
        ("<table><tr><td>a<td><td>c</table>", "a | | c"),
        ("<table><tr><td>a<td><table><tr><td>b<td>c</table></table>", "a\n\nb | c"),
        ("a<pre>\n  x\n    <b>y</b><br>z\n</pre>b", "a\n\n  x\n    y\nz\n\nb"),
        ("<p>a<!-- b -->c<?php d ?></p>", "ac"),
        ("10<sup>−3</sup> H<sub>2</sub>O <sup>[1]</sup> x<sup>2y</sup>", "10⁻³ H₂O [1] x2y"),
        ("中文<ruby>漢<rp>(</rp><rt>kan</rt></ruby>&#128512;", "中文漢😀"),
        ("<math>a\x0bb</math>\x0bc", "abc"),
        ("area <math alttext='\\pi r^2'><mi>π</mi></math>.", "area \\pi r^2."),
    ],
)
def test_line_breaks_follow_the_blocks(tmp_path, markup, expected):
    assert text(tmp_path, markup) == expected


@pytest.mark.parametrize(
    "markup",
    [
        "<script>x</script>{}<style>x</style>",
        "<nav>x</nav>{}<div role=search>x</div>",
        "<header>x</header><aside>x</aside>{}<footer>x</footer>",
        "<p hidden>x</p>{}<p style='color: red; display : none'>x</p><p aria-hidden=true>x</p>",
        "<form>x<button>x</button></form>{}<noscript>x</noscript><template>x</template>",
        "<div>x</div><main>{}</main>x",
    ],
)
def test_what_is_not_the_page_is_left_out(tmp_path, markup):
    assert text(tmp_path, markup.format("<article><header>a</header> b</article>")) == "a\nb"


@pytest.mark.parametrize(
    "attributes",
    [
        "src='https://a.example/1.png'",
        "src='//a.example/1.png'",
        "src='/1.png'",
        "src='file:///etc/passwd'",
        "src='C:\\1.png'",
        "src='drawing.svg#part'",
        "src=''",
        "alt='no source'",
        "data-src='https://a.example/1.png' src='data:image/gif;base64,AAAA'",
        "src='data:image/svg+xml,<svg/>'",
    ],
)
def test_images_that_are_not_beside_the_page_are_left_out(tmp_path, attributes):
    assert text(tmp_path, f"a<img {attributes}>b") == "ab"


def test_late_images_are_read_from_where_they_are(tmp_path):
    path = page(
        tmp_path, "<img data-src=a.png src=b.png><img data-src=https://x.example/a.png src=b.png>", a=b"a", b=b"b"
    )
    assert [segment.data for segment in document(path).segments] == [b"a", b"b"]


@pytest.mark.parametrize(
    ("encoding", "head"),
    [
        ("utf-8", ""),
        ("utf-8-sig", "<meta charset=latin1>"),
        ("utf-16", ""),
        ("gb18030", "<meta charset=gb2312>"),
        ("big5", "<meta http-equiv=Content-Type content='text/html; charset=Big5'>"),
    ],
)
def test_the_declared_encoding_is_used(tmp_path, encoding, head):
    assert text(tmp_path, f"{head}<p>中文".encode(encoding)) == "中文"


@pytest.mark.parametrize(
    ("markup", "message"),
    [
        (b"<p>\xff", "is not text in utf-8 .*0xff"),
        (b"<meta charset=klingon><p>a", "is not text in klingon"),
        (b"<p>a\0b", "holds a NUL character at 4"),
        (b" ", "neither text nor an image"),
        (b"<script>a</script>", "neither text nor an image"),
        (b"<div>" * 3000 + b"x", "cannot be parsed .*depth"),
        (b"<img src=absent.png>", "absent.png cannot be read \\(No such file"),
        (b"<img src=../secret.png>", "is outside of"),
        (b"<img src=%2e%2e/secret.png>", "is outside of"),
        (b"<img src=link.png>", "is outside of"),
        (b"<img src=a%00b.png>", "NUL byte in its name"),
        (b"<img src='data:image/png;base64,a'>", "is not base64"),
    ],
)
def test_a_malformed_page_is_named(tmp_path, markup, message):
    (tmp_path / "secret.png").write_bytes(PNG)
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "link.png").symlink_to(tmp_path / "secret.png")
    path = page(tmp_path / "site", markup)
    error = document(path)
    assert isinstance(error, DataError)
    with pytest.raises(DataError, match=message):
        raise error
    assert str(error).startswith(f"{path}: ")


def test_a_page_larger_than_the_bound_is_not_read(tmp_path):
    path = page(tmp_path, "<p>" + "a" * 1000)
    assert str(document(path, max_record_bytes=1000)).startswith(f"{path}: is larger than --max-record-bytes 1,000")


def test_a_large_page_is_read_whole(tmp_path):
    """libxml2's own bound on text, 10 MB, would cut this one off."""
    words = "word " * 2_500_000
    assert text(tmp_path, f"<p>{words}</p><p>end") == f"{words.strip()}\n\nend"
