import base64
import json

import pytest

from megavl.data.document import Image, Text
from megavl.data.errors import DataError
from tests.data.conftest import image_bytes
from tests.data.readers.reading import read

PNG = image_bytes(0, (4, 3))
BASE64 = base64.encodebytes(PNG).decode()


def write(path, cells, **changes):
    path.write_text(json.dumps({"nbformat": 4, "nbformat_minor": 5, "metadata": {}, "cells": cells} | changes))
    return path


def document(path):
    (found,) = read(path)
    return found


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
    found = document(path)
    assert (found.key, found.source) == ("n.ipynb", str(path))
    first, image, last = found.segments
    assert first == Text("# Title\nwords\n\n```r\nplot()\n```\n\n```\nred\n```")
    assert image == Image(PNG, "output of cell 2")
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
    text, image = document(path).segments
    assert text == Text("Title\n\n```python\nx = 1\nx\n```\n\n```\n1\n```")
    assert image.data == PNG


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[]", "is a list"),
        ('{"nbformat": 2}', r"is no notebook of format 3 or 4 \(nbformat a number \(2\)\)"),
        ('{"nbformat": 4, "cells": []}', "holds neither text nor an image"),
        ('{"nbformat": 4, "cells": [7]}', "cell 1 is a number"),
        (
            '{"nbformat": 4, "cells": [{"cell_type": "code", "source": 7}]}',
            "cell 1 has a number .7. where text belongs",
        ),
        (
            '{"nbformat": 4, "cells": [{"cell_type": "raw", "source": ["a", 7]}]}',
            "cell 1 has a list .* where text belongs",
        ),
        (
            '{"nbformat": 4, "cells": [{"cell_type": "code", "outputs": {}}]}',
            "cell 1: an object .* where a list belongs",
        ),
        ('{"nbformat": 4, "cells": [{"cell_type": "raw", "source": "\\ud800"}]}', "cell 1 holds half of a surrogate"),
        ('{"nbformat": 4, "cells": [{"cell_type": "raw", "source": "\\u0000"}]}', "cell 1 holds a NUL byte"),
        (
            json.dumps({"nbformat": 4, "cells": [code("", figure(**{"image/png": "a"}))]}),
            "cell 1: an image .* not base64",
        ),
        (
            json.dumps({"nbformat": 4, "cells": [code("", figure(**{"image/png": "é"}))]}),
            "cell 1: an image .* not base64",
        ),
    ],
)
def test_a_malformed_notebook_is_named(tmp_path, content, message):
    (tmp_path / "n.ipynb").write_text(content)
    error = document(tmp_path / "n.ipynb")
    assert isinstance(error, DataError)
    with pytest.raises(DataError, match=message):
        raise error
    assert str(error).startswith(f"{tmp_path / 'n.ipynb'}: ")
