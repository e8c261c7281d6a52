"""The page in a browser: it shows what the datasets hold, and nothing that a document says can act."""

import json
import re
import shutil
from html.parser import HTMLParser

import pytest

from megavl.config.load import load_run
from megavl.config.tiles import Tiling
from megavl.data.errors import DataError
from megavl.data.inspect.packs import planned
from megavl.data.inspect.page import embed, write_page
from megavl.data.inspect.sample import read
from megavl.data.inspect.shown import ImagePart, Role, TextPart
from megavl.data.inspect.statistics import count
from megavl.data.sampler import Sampler
from tests.data.inspect.conftest import HOSTILE

CHROMIUM = shutil.which("chromium")


@pytest.fixture(scope="module")
def written(gallery, tmp_path_factory):
    """(path of the page, documents, packs)."""
    path = tmp_path_factory.mktemp("page") / "page.html"
    config = load_run(gallery.recipe)
    tiling = Tiling(config.model)
    documents = [read(gallery.store, document, gallery.tokenizer, 200, tiling) for document in range(5)]
    packs = list(planned(Sampler(config.data, config.model, config.train), gallery.tokenizer, 0, 3))
    write_page(str(path), [count(gallery.store, lambda _: None, tiling)] * 2, documents, packs, gallery.tokenizer)
    return path, documents, packs


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("no chromium on PATH: install the Debian package chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # No sandbox: it cannot be made by root in a container, and the page is our own.
        yield playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])


@pytest.fixture(scope="module")
def opened(browser, written):
    """(page, what it complained of, what it asked the network for)."""
    page = browser.new_page(viewport={"width": 1200, "height": 900})
    complaints, requests = [], []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(written[0].as_uri())
    return page, complaints, requests


def parts(samples, kind):
    return [part for sample in samples for part in sample.parts if isinstance(part, kind)]


def packed(packs, kind):
    return [part for pack in packs for piece in pack.pieces for _, part in piece.parts if isinstance(part, kind)]


def test_the_page_is_quiet_and_asks_for_nothing(opened, written):
    page, complaints, requests = opened
    assert complaints == []
    assert [url for url in requests if not url.startswith("data:")] == [written[0].as_uri()]


def test_every_token_is_there_with_its_role(opened, written):
    page, _, _ = opened
    _, documents, packs = written
    for section, texts in (("#documents", parts(documents, TextPart)), ("#packs", packed(packs, TextPart))):
        assert page.locator(f"{section} .token").count() == sum(len(part.ids) for part in texts)
        for role in Role:
            expected = sum(part.roles.count(role) for part in texts)
            assert page.locator(f"{section} .token.{role}").count() == expected, role
        shown = page.eval_on_selector_all(f"{section} .tokens", "all => all.map(one => one.textContent)")
        assert shown == ["".join(part.pieces) for part in texts]


def test_hovering_shows_the_id(opened, written):
    page, _, _ = opened
    (first, *_) = parts(written[1], TextPart)
    page.locator(".token").nth(1).hover()
    assert page.locator("#hint").inner_text() == f"id {first.ids[1]} · learned"


def test_images_are_loaded_and_a_broken_one_says_why(opened, written):
    page, _, _ = opened
    _, documents, packs = written
    page.eval_on_selector_all("details", "all => all.forEach(one => one.open = true)")
    page.eval_on_selector_all("img", "all => Promise.all(all.map(one => (one.loading = 'eager', one.decode())))")
    widths = page.eval_on_selector_all("img", "all => all.map(one => one.naturalWidth)")
    images = [*parts(documents, ImagePart), *packed(packs, ImagePart)]
    assert widths == [60] * sum(part.form != "unknown" for part in images)
    assert page.locator(".broken").count() == sum(part.form == "unknown" for part in images) > 0
    assert "8 bytes that cannot be decoded as an image" in page.locator(".broken").first.inner_text()


def test_images_are_shown_with_their_tiles(opened, written):
    page, _, _ = opened
    _, documents, packs = written
    for section, images in (("#documents", parts(documents, ImagePart)), ("#packs", packed(packs, ImagePart))):
        captions = page.eval_on_selector_all(f"{section} figcaption", "all => all.map(one => one.textContent)")
        assert [caption.rpartition(" · ")[2] for caption in captions] == [image.taken for image in images]
        assert {"2 x 1 tiles, 17 tokens"} <= {image.taken for image in images}
    words = page.eval_on_selector_all("#packs summary p", "all => all.map(one => one.textContent)")
    for pack, shown in zip(packs, words, strict=True):
        assert (f" · {pack.tiles} of 8 tiles · " in shown) == (pack.tiles > 0)


def test_bars_of_packs_have_every_token(opened, written):
    page, _, _ = opened
    _, _, packs = written
    bars = page.eval_on_selector_all(
        ".bar", "all => all.map(bar => [...bar.querySelectorAll('.run')].map(run => Number(run.dataset.tokens)))"
    )
    assert [sum(bar) for bar in bars] == [sum(piece.stop - piece.start for piece in pack.pieces) for pack in packs]
    grown = page.eval_on_selector_all(
        ".bar", "all => all.map(bar => [...bar.children].reduce((sum, one) => sum + Number(one.style.flexGrow), 0))"
    )
    assert grown == [pack.seq_len for pack in packs]
    beyond = sum(piece.beyond is not None for pack in packs for piece in pack.pieces)
    assert page.locator("#packs .beyond").count() == beyond > 0


def test_histograms_count_every_document_and_image(opened, gallery):
    page, _, _ = opened
    sums = page.eval_on_selector_all(
        "#statistics svg",
        "all => all.map(svg => [...svg.querySelectorAll('.hit')].reduce((sum, bar) => sum + +bar.dataset.count, 0))",
    )
    assert sums == [5, 5, 5, 5] * 2


def test_a_hostile_document_is_only_text(opened):
    page, _, _ = opened
    assert page.title() != "broken out" and page.locator("script").count() == 2
    assert page.locator("#documents h2").first.text_content() == "hostile " + HOSTILE
    assert page.locator("img[src='x']").count() == 0


def test_the_view_has_keys_and_fits_a_narrow_window(browser, written):
    page = browser.new_page(viewport={"width": 360, "height": 700}, color_scheme="dark")
    page.goto(written[0].as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    background = "getComputedStyle(document.querySelector('.token.target')).backgroundColor"
    shaded = page.evaluate(background)
    page.keyboard.press("m")
    assert page.evaluate(background) != shaded and not page.locator("#mask").is_checked()
    assert page.evaluate("scrollY") == 0
    page.keyboard.press("j")
    page.keyboard.press("j")
    far = page.evaluate("scrollY")
    page.keyboard.press("k")
    assert 0 < page.evaluate("scrollY") < far


class Scripts(HTMLParser):
    """The contents of the script elements, as an HTML parser finds them."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.inside = False

    def handle_starttag(self, tag, attributes):
        if tag == "script":
            self.inside = True
            self.found.append("")

    def handle_endtag(self, tag):
        self.inside = self.inside and tag != "script"

    def handle_data(self, data):
        if self.inside:
            self.found[-1] += data


@pytest.mark.parametrize(
    "text", [HOSTILE, "<!--<script>", "]]>", "\u2028\u2029", "&lt;/script&gt;", '"\\"', "{{script}}"]
)
def test_data_cannot_end_its_element(text):
    embedded = embed([text])
    assert not re.search("[<>&\u2028\u2029]", embedded) and json.loads(embedded) == [text]


def test_the_page_is_one_file_without_any_address(written):
    text = written[0].read_text(encoding="utf-8")
    assert [path.name for path in written[0].parent.iterdir()] == ["page.html"]
    scripts = Scripts()
    scripts.feed(text)
    data, code = scripts.found
    assert json.loads(data)["documents"][0]["key"] == "hostile " + HOSTILE
    assert code.strip().startswith('"use strict"') and "{{" not in code
    assert set(re.findall(r"https?://[^\"]*", text)) == {"http://www.w3.org/2000/svg"}
    assert "default-src 'none'" in text and "unsafe" not in text


def test_a_page_that_cannot_be_written_leaves_nothing(gallery, tmp_path):
    (tmp_path / "taken").mkdir()
    with pytest.raises(DataError, match="taken cannot be written .*another file"):
        write_page(str(tmp_path / "taken"), [], [], [], None)
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]
