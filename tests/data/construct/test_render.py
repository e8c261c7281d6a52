"""Rendered pages against a second witness: the text layer of the same page, printed by Chromium and read by PDFium."""

import io
import re
import shutil
import unicodedata

import pypdfium2
import pytest
from PIL import Image

from megavl.data.construct.browser import Browser, executable
from megavl.data.construct.render import Render
from megavl.data.construct.sample import Sample
from megavl.data.construct.template import TEMPLATES
from megavl.data.errors import DataError
from tests.data.conftest import image_bytes
from tests.data.readers.test_epub import XHTML, write

DPI = 72
NO_FONT = "characters that no font has"

ENGLISH = """# A title

A paragraph of *several* words with `code` in it, and so on until the line is full and goes on in the next one.

1. first
2. second
   - inner
     - innermost

10. tenth

| name | value |
|---|---:|
| a | 1 |
| b | &lt;2 |

```
def f(x):

    return x  # indented
```

> A quotation.

"""
CHINESE = """<h2>第一章</h2><p>中文的段落,<b>没有</b>空格,水是 H<sub>2</sub>O,面积是 10<sup>3</sup> 平方米。</p>
<ol start="3"><li><p>第三项</p><p>还有一段</p></li><li>第四项<img src="picture.png"></li></ol>
<table><tr><th>一</th><th>二</th></tr><tr><td></td><td>四</td></tr></table><q>引用</q>"""


@pytest.fixture(scope="module")
def browser():
    """One for all tests here: it takes a second to start."""
    try:
        executable()
    except DataError:
        pytest.skip("needs the Debian package chromium")
    with Browser(DPI) as browser:
        yield browser


def squeezed(text):
    """What both witnesses must agree on: every character but white space and the notation of cells."""
    text = unicodedata.normalize("NFKC", text)
    return re.sub(r"[\s|\x02\ufffe]", "", text)


class Witness:
    """A browser that prints every page it shows to PDF, before the next one."""

    def __init__(self, browser):
        self._browser = browser
        self.texts = []

    def pages(self, markup, template):
        for page in self._browser.pages(markup, template):
            printed = self._browser._page(template).pdf(
                width=f"{template.width}px", height=f"{template.height}px", print_background=True
            )
            document = pypdfium2.PdfDocument(printed)
            assert len(document) == 1
            self.texts.append(document[0].get_textpage().get_text_bounded())
            yield page


def samples(browser, path, template):
    return list(Render((template,), DPI).rendered(browser, str(path)))


@pytest.mark.parametrize("template", TEMPLATES)
def test_the_text_is_what_the_page_shows(browser, tmp_path, template):
    (tmp_path / "picture.png").write_bytes(image_bytes(0, (300, 200)))
    (tmp_path / "english.md").write_text(ENGLISH * 7)
    (tmp_path / "chinese.html").write_text("<meta charset=utf-8><nav>no</nav>" + CHINESE * 7, encoding="utf-8")
    size = TEMPLATES[template].width * DPI // 96, TEMPLATES[template].height * DPI // 96
    for name in ("english.md", "chinese.html"):
        witness = Witness(browser)
        found = samples(witness, tmp_path / name, template)
        if name == "chinese.html" and not isinstance(found[0], Sample) and found[0].reason == NO_FONT:
            pytest.skip("needs the Debian package fonts-wqy-microhei, or another font with Chinese characters")
        assert len(found) > 1
        for number, (sample, printed) in enumerate(zip(found, witness.texts, strict=True), start=1):
            assert sample.key == f"{tmp_path / name}:{number}"
            assert squeezed(sample.text) == squeezed(printed)
            picture = Image.open(io.BytesIO(sample.image))
            assert picture.size == pytest.approx(size, abs=1)
            assert len(picture.convert("L").getcolors()) > 20  # letters, not an empty page


def test_the_text_has_the_line_breaks_of_blocks_and_the_folio(browser, tmp_path):
    (tmp_path / "page.md").write_text(ENGLISH)
    (sample,) = samples(browser, tmp_path / "page.md", "exam")
    assert sample.text == (
        "A title\n\nA paragraph of several words with code in it, and so on until the line is full and goes on in the "
        "next one.\n\n1. first\n\n2. second\n\n\u2022 inner\n\u2022 innermost\n\n3. tenth\n\nname | value\na | 1\n"
        "b | <2\n\ndef f(x):\n\n    return x  # indented\n\nA quotation.\n\n1 / 1"
    )


def test_text_goes_on_where_the_page_before_ended(browser, tmp_path):
    """A paragraph and a block of code over several pages, cut within one text node each, come back whole."""
    words = " ".join(f"w{number}" for number in range(2000))
    lines = "\n".join(f"{number}:  {'x' * (number % 150)}" for number in range(120))
    (tmp_path / "page.html").write_text(f"<p>{words}<pre>{lines}")
    found = samples(browser, tmp_path / "page.html", "web")
    assert len(found) > 3
    text = "\n".join(sample.text for sample in found)
    assert text.split() == [*words.split(), *lines.split()]
    assert "\n7:  xxxxxxx\n" in text


def test_deep_nesting_stays_in_its_column(browser, tmp_path):
    deep = "".join(f"<ul><li>level {level}<blockquote>said {level}" for level in range(40))
    (tmp_path / "page.html").write_text(deep + "<p>" + "words " * 300)
    witness = Witness(browser)
    found = samples(witness, tmp_path / "page.html", "article")
    assert [squeezed(sample.text) for sample in found] == [squeezed(printed) for printed in witness.texts]


def test_the_same_document_gives_the_same_pages(browser, tmp_path):
    (tmp_path / "page.md").write_text(ENGLISH)
    first, again = (samples(browser, tmp_path / "page.md", "book") for _ in range(2))
    assert first == again


def test_pictures_are_shown_and_broken_ones_are_left_out(browser, tmp_path):
    Image.new("RGBA", (80, 80), (255, 0, 0, 128)).save(tmp_path / "red.png")
    (tmp_path / "broken.png").write_bytes(b"broken")
    references = ("red.png", "broken.png", "absent.png", "../out.png", "https://a.example/a.png", "file:///etc/passwd")
    (tmp_path / "page.html").write_text("words" + "".join(f"<img src='{name}'>" for name in references))
    (sample,) = samples(browser, tmp_path / "page.html", "web")
    colours = {
        colour: count for count, colour in Image.open(io.BytesIO(sample.image)).convert("RGB").getcolors(1 << 20)
    }
    assert colours[255, 127, 127] == pytest.approx(60 * 60, rel=0.05)
    assert sample.text == "words"


def test_a_page_runs_nothing_and_shows_nothing_hidden(browser, tmp_path):
    markup = (
        "<p onclick='x' style='color: white; display: none'>no</p><script>document.body.innerHTML = 'no'</script>"
        "<p style='color: white'>so\u00adft\u200b</p><svg onload=alert(1)></svg><iframe srcdoc='no'></iframe>"
        "<input value=no>"
    )
    (tmp_path / "page.html").write_text(markup, encoding="utf-8")
    (sample,) = samples(browser, tmp_path / "page.html", "web")
    assert sample.text == "soft"


def test_chapters_of_a_book_are_documents(browser, tmp_path):
    chapters = [XHTML.format(text) for text in ("<p>one</p>", "", "<p>&#xFFFF;<", "<img src='absent.png'/><p>four</p>")]
    book = write(tmp_path / "b.epub", chapters)
    first, *dropped, last = samples(browser, book, "web")
    assert [(sample.key, sample.text) for sample in (first, last)] == [(f"{book}:1:1", "one"), (f"{book}:4:1", "four")]
    assert [drop.where for drop in dropped] == [f"{book}:2", f"{book}:3"]


@pytest.mark.parametrize(
    ("markup", "reason", "detail"),
    [
        ("", "no text", ""),
        ("<p> </p>", "no text", ""),
        ("\u0e01 a", NO_FONT, "U+0E01"),
        ("<table><tr>" + "<td>words" * 80, "something wider than its column", ""),
        ("<table><tr>" + f"<td>{'long ' * 4000}</td>" * 2, "a table row longer than a page", ""),
        ("a" * 1_000_001, "more than 1,000,000 characters", "1,000,0"),
        ("\0", "no readable document", "NUL"),
    ],
)
def test_what_cannot_be_shown_faithfully_is_dropped(browser, tmp_path, markup, reason, detail):
    path = tmp_path / "page.html"
    path.write_text(markup, encoding="utf-8")
    (dropped,) = samples(browser, path, "article")
    assert (dropped.where, dropped.reason) == (str(path), reason)
    assert detail in dropped.detail


def test_a_browser_that_crashes_costs_one_document(browser, tmp_path):
    (tmp_path / "page.md").write_text("words")
    browser._chromium.close()
    (dropped,) = samples(browser, tmp_path / "page.md", "web")
    assert dropped.reason == "the browser failed on it"
    (sample,) = samples(browser, tmp_path / "page.md", "web")
    assert sample.text == "words"


def test_a_document_s_template_depends_on_its_text_alone(browser, tmp_path):
    class Recorder:
        seen = ()

        def pages(self, markup, template):
            self.seen += (template.name,)
            return []

    recorders = [Recorder(), Recorder()]
    for folder, recorder in zip(("a", "b"), recorders, strict=True):
        (tmp_path / folder).mkdir()
        for number in range(20):
            (tmp_path / folder / f"{number}.md").write_text(f"text {number}")
            list(Render().rendered(recorder, str(tmp_path / folder / f"{number}.md")))
    assert recorders[0].seen == recorders[1].seen
    assert set(recorders[0].seen) == set(TEMPLATES)


def test_without_a_browser_the_package_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(DataError, match="no Chromium .* install the Debian package chromium"):
        next(Render().samples([str(tmp_path)]))
