import base64
import json

import pytest

from megavl.data.document import Image, Text
from megavl.data.errors import DataError
from megavl.data.readers import notebook
from tests.data.conftest import image_bytes

PNG = image_bytes(0, (4, 3))
BASE64 = base64.encodebytes(PNG).decode()


def write(path, cells, **changes):
    path.write_text(json.dumps({"nbformat": 4, "nbformat_minor": 5, "metadata": {}, "cells": cells} | changes))
    return path


def read(path):
    (part,) = notebook.split(str(path), 1 << 20)
    (document,) = notebook.read(part)
    return document


def code(source, *outputs):
    return {"cell_type": "code", "metadata": {}, "execution_count": 1, "source": source, "outputs": list(outputs)}


def figure(**data):
    return {"output_type": "display_data", "metadata": {}, "data": {"text/plain": ["<Figure size 4x3>"]} | data}


def test_markdown_code_and_outputs_come_in_order(tmp_path):
    cells = [
        {"cell_type": "markdown", "source": ["# Title\n", "words"]},
        code(
            "plot()",
            {"output_type": "stream", "name": "stdout", "text": ["\x1b[31mred\x1b[0m\n"]},
            {"output_type": "stream", "name": "stderr", "text": "a warning"},
            figure(**{"image/png": BASE64}),
            {"output_type": "error", "ename": "E", "evalue": "", "traceback": ["t"]},
        ),
        code("", {"output_type": "execute_result", "data": {"text/html": "<b>", "text/plain": "42"}}),
        code(["f = '```'"]),
    ]
    path = write(tmp_path / "n.ipynb", cells, metadata={"kernelspec": {"language": "R"}})
    document = read(path)
    assert (document.key, document.source) == ("n.ipynb", str(path))
    first, image, last = document.segments
    assert first == Text("# Title\nwords\n\n```r\nplot()\n```\n\n```\nred\n```")
    assert image == Image(PNG, f"output of cell {path}:2")
    assert last == Text("\n\n```\n42\n```\n\n````r\nf = '```'\n````")


def test_format_3_is_read_like_format_4(tmp_path):
    cells = [
        {"cell_type": "heading", "level": 1, "source": "Title"},
        {
            "cell_type": "code",
            "language": "python",
            "input": ["x = 1\n", "x"],
            "outputs": [
                {"output_type": "pyout", "text": ["1"], "prompt_number": 1},
                {"output_type": "stream", "stream": "stderr", "text": "w"},
                {"output_type": "display_data", "png": BASE64, "text": "<Figure>"},
            ],
        },
    ]
    path = tmp_path / "n.ipynb"
    path.write_text(json.dumps({"nbformat": 3, "worksheets": [{"cells": cells[:1]}, {"cells": cells[1:]}]}))
    text, image = read(path).segments
    assert text == Text("Title\n\n```python\nx = 1\nx\n```\n\n```\n1\n```")
    assert image.data == PNG


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "n.ipynb: is not JSON in UTF-8"),
        ("[" * 100_000, "n.ipynb: is not JSON in UTF-8"),
        ("[]", "n.ipynb: is JSON, but no notebook"),
        ('{"nbformat": 2}', r"n.ipynb: is no notebook of format 3 or 4 \(nbformat 2\)"),
        ('{"nbformat": 4, "cells": []}', "n.ipynb: holds neither text nor an image"),
        ('{"nbformat": 4, "cells": [7]}', "n.ipynb:1: is no cell"),
        ('{"nbformat": 4, "cells": [{"cell_type": "code", "source": 7}]}', "n.ipynb:1: holds '7' where text belongs"),
        (
            '{"nbformat": 4, "cells": [{"cell_type": "raw", "source": ["a", 7]}]}',
            "n.ipynb:1: holds .* where text belongs",
        ),
        (
            '{"nbformat": 4, "cells": [{"cell_type": "code", "outputs": {}}]}',
            "n.ipynb:1: holds '{}' where a list belongs",
        ),
        (
            '{"nbformat": 4, "cells": [{"cell_type": "raw", "source": "\\ud800"}]}',
            "n.ipynb:1: holds half of a surrogate",
        ),
        (
            json.dumps({"nbformat": 4, "cells": [code("", figure(**{"image/png": "a"}))]}),
            "n.ipynb:1: an image .* not base64",
        ),
    ],
)
def test_a_malformed_notebook_is_named(tmp_path, content, message):
    (tmp_path / "n.ipynb").write_text(content)
    error = read(tmp_path / "n.ipynb")
    assert isinstance(error, DataError)
    with pytest.raises(DataError, match=message):
        raise error
