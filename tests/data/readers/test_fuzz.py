"""Readers take whatever comes. More inputs: `python -m tests.data.readers.fuzz`."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megavl.data.document import Document
from megavl.data.errors import DataError
from megavl.data.readers.record import KEYS, LAYOUTS, Place, Record, to_document
from megavl.data.template import TEMPLATES
from tests.data.readers.fuzz import PICTURE, SEEDS, check, fuzz

INPUTS = 150


@pytest.mark.parametrize("name", SEEDS)
def test_a_sound_file_is_read_and_a_damaged_one_is_documents_or_a_data_error(tmp_path, name):
    (tmp_path / "a.gif").write_bytes(PICTURE)
    (tmp_path / name).write_bytes(SEEDS[name])
    assert check(tmp_path / name, 1 << 20)
    for seed in range(INPUTS):
        fuzz(tmp_path, name, seed)


WORDS = st.sampled_from(["", "x", "<image>", "a<image>b", "user", "human", "gpt", "assistant", "system", "image", "\0"])
FIELDS = st.sampled_from(
    [*KEYS, "from", "value", "role", "content", "type", "token", "supervised", "user", "assistant", "bytes", "path"]
    + ["image_name", "matched_text_index", "query", "boxes", "question"]
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 3) | WORDS | st.text(max_size=3) | st.binary(max_size=2),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(FIELDS, inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=500, deadline=None, database=None)
@given(
    st.sampled_from(list(LAYOUTS)),
    VALUES,
    st.dictionaries(FIELDS, VALUES, max_size=2),
    st.sampled_from(list(TEMPLATES)),
)
def test_any_record_is_a_document_or_a_data_error(layout, value, others, template):
    record = Record(others | {layout: value}, lambda reference: b"image", TEMPLATES[template])
    try:
        document = to_document(record, Place("a.jsonl", 1))
    except DataError:
        return
    assert isinstance(document, Document) and document.segments
