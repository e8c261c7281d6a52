import base64
import json

from megavl.data.construct.plots import Plots
from megavl.data.construct.sample import Dropped, Sample
from tests.data.conftest import image_bytes
from tests.data.readers.test_notebook import code, figure
from tests.data.readers.test_notebook import write as write_notebook

PNG = image_bytes(0, (40, 30))
FIVE = "import numpy\n# not counted\n\n%matplotlib inline\n!ls\n" + "\n".join(
    f"x{number} = {number}" for number in range(3)
)


def plot(data=PNG, kind="image/png"):
    return figure(**{kind: base64.b64encode(data).decode()})


def pairs(tmp_path, cells, **changes):
    path = write_notebook(tmp_path / "n.ipynb", cells, **changes)
    return list(Plots().samples([str(path)])), str(path)


def test_a_diagram_has_the_code_back_to_the_diagram_before(tmp_path):
    cells = [
        code(FIVE + "\n", {"output_type": "stream", "name": "stdout", "text": "text is no diagram"}),
        {"cell_type": "markdown", "source": "not code"},
        code("plt.plot(x0)", plot()),
        code(FIVE),
        code(["y = 1\n", "plt.bar(y)"], plot(b"\xff\xd8 broken", "image/jpeg")),
        code("plt.show()\n" * 5, plot()),
        code("after = 1"),
    ]
    found, path = pairs(tmp_path, cells)
    first, broken, last = found
    assert first == Sample(f"{path}:3", PNG, ".png", f"{FIVE}\n\nplt.plot(x0)")
    assert (broken.where, broken.reason) == (f"{path}:5", "image does not decode")
    assert last == Sample(f"{path}:6", PNG, ".png", "plt.show()\n" * 4 + "plt.show()")


def test_five_lines_count_neither_blank_lines_nor_comments_nor_commands(tmp_path):
    found, path = pairs(tmp_path, [code(FIVE, plot()), code(FIVE + "\ny = 2", plot())])
    assert found[0] == Dropped(f"{path}:1", "fewer than 5 lines of code", "4")
    assert found[1].key == f"{path}:2"


def test_more_than_one_image_is_dropped_with_its_code(tmp_path):
    found, path = pairs(tmp_path, [code(FIVE + "\ny = 2", plot(), plot()), code("z = 1", plot())])
    assert found == [
        Dropped(f"{path}:1", "more than one image", "2"),
        Dropped(f"{path}:2", "fewer than 5 lines of code", "1"),
    ]


def test_other_languages_and_files_are_dropped(tmp_path):
    found, path = pairs(tmp_path, [code(FIVE, plot())], metadata={"language_info": {"name": "R"}})
    assert found == [Dropped(path, "not in Python", "r")]
    (tmp_path / "bad.ipynb").write_text(json.dumps([]))
    (bad,) = Plots().samples([str(tmp_path / "bad.ipynb")])
    assert (bad.where, bad.reason) == (str(tmp_path / "bad.ipynb"), "no readable notebook")


def test_a_jpeg_keeps_its_kind(tmp_path):
    jpeg = image_bytes(0, (8, 8), "JPEG")
    (sample,), _ = pairs(tmp_path, [code("x = 1\n" * 5, plot(jpeg, "image/jpeg"))])
    assert (sample.image, sample.suffix) == (jpeg, ".jpg")
