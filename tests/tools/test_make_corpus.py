"""The quickstart's corpus: what is written is whole, true to its text, and the same for the same seed."""

import json
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megavl.config.presets import PRESETS
from megavl.config.tiles import Tiling
from megavl.data.document import Token
from megavl.data.readers.record import Place, Record, to_document
from megavl.data.template import TEMPLATES

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    """Two corpora of one seed, made at the same time: one for VL2 models, and one for VL models over the remains of an
    earlier one."""
    first, second = tmp_path_factory.mktemp("corpus"), tmp_path_factory.mktemp("again")
    (second / "images").mkdir()
    (second / "images" / "old.png").write_bytes(b"old")
    (second / "old.jsonl").write_text("old")
    running = [
        subprocess.Popen(
            [sys.executable, "tools/make_corpus.py", "--output", path, "--size", "tiny", *family], cwd=ROOT
        )
        for path, family in ((first, ["--family", "vl2"]), (second, []))
    ]
    assert [process.wait() for process in running] == [0, 0]
    return first, second


def records(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def images(record):
    return record.get("images") or [segment["image"] for segment in record["segments"] if "image" in segment]


def test_the_same_seed_gives_the_same_corpus(corpora):
    """What only VL2 models read is besides."""
    first, second = ({str(p.relative_to(c)): p.read_bytes() for p in c.rglob("*.*")} for c in corpora)
    assert {name: data for name, data in first.items() if "grounding" not in name} == second != first


def test_every_record_is_a_document(corpora):
    for name in ("text", "heldout_text"):
        for record in records(corpora[0] / f"{name}.jsonl"):
            assert record["id"] and record["text"].strip()
    for name in ("multimodal", "heldout_multimodal"):
        for record in records(corpora[0] / f"{name}.jsonl"):
            # An image is followed by the text that goes with it.
            kinds = ["image" if "image" in segment else "text" for segment in record["segments"]]
            assert kinds in (["image", "text"], ["text", "image", "text", "image", "text"])
            assert all(segment["text"].strip() for segment in record["segments"] if "text" in segment)


def test_every_image_belongs_to_one_document_and_shows_something(corpora):
    named = [
        name
        for part in ("multimodal", "heldout_multimodal", "grounding", "heldout_grounding")
        for r in records(corpora[0] / f"{part}.jsonl")
        for name in images(r)
    ]
    assert sorted(named) == sorted(f"images/{path.name}" for path in (corpora[0] / "images").iterdir())
    for name in named:
        with Image.open(corpora[0] / name) as image:
            assert image.mode == "RGB" and max(image.size) < 400
            assert max(brightest - darkest for darkest, brightest in image.getextrema()) > 100


def test_the_size_is_what_was_asked_for(corpora):
    train = records(corpora[0] / "multimodal.jsonl")
    assert len(train) == 34  # 20 pages, 4 pairs of pages, 4 charts with code, 4 with a table, 2 pairs of charts
    assert sum(len(images(record)) for record in train) == 40
    assert len(records(corpora[0] / "heldout_multimodal.jsonl")) == 10
    assert [len(records(corpora[0] / f"{part}grounding.jsonl")) for part in ("", "heldout_")] == [40, 2]


def test_no_source_is_on_both_sides(corpora):
    train, heldout = (
        {record["id"].partition("/")[0] for record in records(corpora[0] / f"{name}.jsonl")}
        for name in ("text", "heldout_text")
    )
    assert train and heldout and not train & heldout


@pytest.fixture
def corpus(monkeypatch):
    """The modules beside the tool."""
    monkeypatch.syspath_prepend(ROOT / "tools")
    import corpus.chart
    import corpus.library
    import corpus.page
    import corpus.scene

    return corpus


def test_documentation_becomes_blocks(corpus):
    text = (
        "Title\n*****\n\nProse over\ntwo lines.\n\n   if a:\n       b()\n\n   Indented prose is prose.\n\n* an item\n"
    )
    assert [(block.kind, block.text) for block in corpus.library.blocks_of(text)] == [
        ("heading", "Title"),
        ("paragraph", "Prose over two lines."),
        ("code", "if a:\n    b()"),
        ("paragraph", "Indented prose is prose."),
        ("paragraph", "* an item"),
    ]


def test_a_module_is_read_without_running_it(corpus, tmp_path):
    source = tmp_path / "module.py"
    source.write_text(
        '"""What it is."""\nraise RuntimeError\ndef f(a, *, b=1):\n    """Do it."""\ndef _private():\n    """No."""\n'
    )
    document = corpus.library.module_source("module", source)
    assert corpus.library.markdown(document.blocks) == "# module\n\nWhat it is.\n\n    def f(a, *, b=1)\n\nDo it.\n"
    assert document.measures["functions"] == 2 and document.measures["lines"] == 6


def test_passages_fit_a_page_and_end_with_a_sentence(corpus):
    block = corpus.library.Block
    blocks = (
        block("heading", "name"),
        block("paragraph", "One sentence, i.e. the first. " + "The second is longer than the page can hold. " * 5),
        block("code", "def f(x)"),
        block("paragraph", "Short."),
        block("code", "class C"),
    )
    first, second = corpus.page.passages(blocks, 60)
    assert [b.text for b in first] == ["name", "One sentence, i.e. the first."]
    assert [b.text for b in second] == ["def f(x)", "Short."]


def test_nothing_is_cut_off_at_the_edge_of_a_page(corpus):
    """In every template the margin beside the text stays paper; what cannot fit is refused."""
    block, rng = corpus.library.Block, random.Random(0)
    for template in corpus.page.TEMPLATES:
        for _ in range(5):
            words = " ".join("".join(rng.choices("abcdefgWM", k=rng.randint(2, 8))) for _ in range(rng.randint(3, 20)))
            page = corpus.page.render((block("paragraph", words),), template)
            width, height = page.size
            margin = template.margin - 4  # a glyph may overhang its box
            for edge in (
                (0, 0, margin, height),
                (width - margin, 0, width, height),
                (0, height - margin, width, height),
            ):
                assert page.crop(edge).getcolors() == [((edge[2] - edge[0]) * (edge[3] - edge[1]), template.paper)]
        assert corpus.page.render((block("paragraph", "word " * 400),), template) is None
        assert corpus.page.render((block("code", "x" * 80),), template) is None


def test_code_of_a_chart_draws_that_chart(corpus):
    rng = random.Random(0)
    measurement = corpus.chart.Measurement("lines", ("os", "re", "json"), (10, 20, 30))
    for _ in range(4):
        code = corpus.chart.plot_code(measurement, rng)
        assert corpus.chart.run_plot(code).tobytes() == corpus.chart.run_plot(code).tobytes()
        changed = code.replace("30]", "5]").replace("linspace(0, ", "linspace(1, ")
        assert corpus.chart.run_plot(changed).tobytes() != corpus.chart.run_plot(code).tobytes()


def test_the_table_of_a_chart(corpus):
    table = corpus.chart.Measurement("lines", ("os", "re"), (10, 20)).table()
    assert table == "| module | lines |\n| --- | --- |\n| os | 10 |\n| re | 20 |\n"


def test_boxes_of_a_scene_are_those_of_its_pixels(corpus):
    """Shapes of one name together: the box around the pixels of each is the one that is told."""
    scene, rng = corpus.scene, random.Random(0)
    for _ in range(60):
        drawn = scene.draw_scene(rng)
        pixels = np.asarray(drawn.image)
        for shape in drawn.shapes:
            left, top, right, bottom = shape.box
            rows, columns = np.nonzero((pixels[top - 1 : bottom + 1, left - 1 : right + 1] != pixels[0, 0]).any(-1))
            assert (rows.min(), rows.max(), columns.min(), columns.max()) == (1, bottom - top, 1, right - left)
            assert tuple(pixels[bottom - 2, (left + right) // 2]) == scene.COLOURS[shape.colour]
        covered = np.zeros(pixels.shape[:2], dtype=bool)
        for left, top, right, bottom in (shape.box for shape in drawn.shapes):
            covered[top:bottom, left:right] = True
        assert (pixels[~covered] == pixels[0, 0]).all()  # nothing is drawn that no box tells of


def test_records_of_scenes_are_documents_of_every_form(corpora):
    """They are read as they are written, and the sizes of the images cut into several grids."""
    template, folder = TEMPLATES["vl2"], corpora[0]
    tiling, forms, grids, absent = Tiling(PRESETS["vl2_debug"]), Counter(), set(), 0
    for number, values in enumerate(records(folder / "grounding.jsonl")):
        record = Record(values, lambda name: (folder / name).read_bytes(), template)
        document = to_document(record, Place("grounding.jsonl", number))
        forms[len(values["images"]), "question" in values] += 1
        absent += any(part.get("boxes") == [] for part in values["grounding"])
        sizes = [Image.open(folder / name).size for name in values["images"]]
        grids |= {tiling.grid(*size, len(sizes)) for size in sizes}
        assert document.segments[-1] == Token()
    assert forms.keys() == {(1, False), (1, True), (2, True)} and absent and len(grids) >= 4
