"""docs/parallelism.md says of every parameter of both families where it is cut."""

import re
from dataclasses import dataclass
from pathlib import Path

import pytest

from megavl.config.model import ModelConfig
from megavl.config.parameters import Parameter, parameters
from megavl.config.presets import PRESETS

PAGE = Path(__file__).parents[2] / "docs/parallelism.md"
ITEMS = {"stem": lambda p, _: p.item == 0, "head": lambda p, last: p.item == last}
ITEMS["i + 1"] = lambda p, _: p.item == int(p.name.split(".")[1]) + 1


@dataclass(frozen=True)
class Row:
    """A row of the table; `attention` is "MHA" or "MLA" where the row is of one of them."""

    names: re.Pattern
    attention: str | None
    shape: str
    tp: str
    sp: str
    ep: str
    item: str

    def covers(self, parameter: Parameter, model: ModelConfig) -> bool:
        mine = "MHA" if model.decoder.mla is None else "MLA"
        return self.attention in (None, mine) and self.names.fullmatch(parameter.name) is not None


def pattern(names: str) -> re.Pattern:
    """`a.{b,c}.*` in backticks, one or several, as one expression; the index of a block is i."""
    patterns = []
    for name in re.findall(r"`([^`]+)`", names):
        name = re.escape(name).replace(r"\*", ".*").replace(r"blocks\.i\.", r"blocks\.\d+\.")
        patterns.append(re.sub(r"\\\{(.*?)\\\}", lambda found: f"({found[1].replace(',', '|')})", name))
    return re.compile("|".join(patterns))


def table() -> list[Row]:
    lines = re.search(r"^\| tensor \|.*\n\|---.*\n((?:\|.*\n)+)", PAGE.read_text(encoding="utf-8"), re.MULTILINE)[1]
    rows = []
    for line in lines.splitlines():
        names, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        if names.startswith("activations"):
            continue
        attention = re.search(r"\((MHA|MLA)\)", names)
        rows.append(Row(pattern(names), attention and attention[1], *cells))
    return rows


ROWS = table()


def sizes(model: ModelConfig) -> dict[str, int]:
    """What the letters of the table mean."""
    decoder = model.decoder
    letters = {"V": decoder.vocab_size, "D": decoder.width, "H": decoder.heads, "K": decoder.kv_heads}
    letters |= {"d": decoder.head_width, "F": decoder.mlp_width}
    if (moe := decoder.moe) is not None:
        letters |= {"E": moe.experts, "S": moe.shared, "W": moe.width}
    if (mla := decoder.mla) is not None:
        letters |= {"R": mla.kv_rank, "n": mla.nope_width, "r": mla.rope_width, "v": mla.value_width}
    return letters


def shape(formula: str, model: ModelConfig) -> tuple[int, ...]:
    """ "H (n + v) × R" in numbers."""
    return tuple(eval(re.sub(r"(?<=\w) (?=[\w(])", " * ", size), {}, sizes(model)) for size in formula.split("×"))


@pytest.mark.parametrize("name", PRESETS)
def test_the_table_is_true(name):
    model = PRESETS[name]
    for parameter in parameters(model):
        rows = [row for row in ROWS if row.covers(parameter, model)]
        assert len(rows) == 1, f"{parameter.name} has {len(rows)} rows in {PAGE}"
        (row,) = rows
        if row.shape:
            assert shape(row.shape, model) == parameter.shape, parameter.name
        tensor_dim = "" if parameter.tensor_dim is None else str(parameter.tensor_dim)
        experts = parameter.expert_dim is not None
        assert row.tp == (f"{tensor_dim} where `cut`" if experts else tensor_dim), parameter.name
        assert row.ep == ("" if parameter.expert_dim is None else str(parameter.expert_dim)), parameter.name
        # Behind the stem, what is trained and whole sees the tokens of its rank alone.
        own_tokens = parameter.item > 0 and parameter.trained and parameter.tensor_dim is None
        assert row.sp == ("summed" if own_tokens else ""), parameter.name
        assert ITEMS[row.item](parameter, model.layers - 1), parameter.name


def test_every_row_is_of_some_parameter():
    listed = [(parameter, model) for model in PRESETS.values() for parameter in parameters(model)]
    assert all(any(row.covers(parameter, model) for parameter, model in listed) for row in ROWS)
