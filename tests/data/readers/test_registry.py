import os

import pytest

from megavl.data.errors import DataError
from megavl.data.readers import json_array, jsonl, table, webdataset
from megavl.data.readers.registry import READERS, input_files, reader_of


@pytest.mark.parametrize(
    ("name", "reader"),
    [
        ("a.jsonl", jsonl),
        ("a.b.JSONL.gz", jsonl),
        ("a.json", json_array),
        ("a.json.zst", json_array),
        ("a.parquet", table),
        ("data-00000-of-00001.arrow", table),
        ("00000.tar", webdataset),
        ("00000.tar.gz", webdataset),
    ],
)
def test_a_reader_is_known_by_the_longest_suffix(name, reader):
    assert reader_of(f"some.tar/{name}") is reader


def test_suffixes_are_of_one_reader_each():
    suffixes = [suffix for reader in READERS for suffix in reader.SUFFIXES]
    assert len(suffixes) == len(set(suffixes))


def test_a_folder_is_its_known_files_sorted_and_a_file_is_itself(tmp_path):
    for name in ("b.jsonl", "a/z.parquet", "a/image.png", ".hidden.jsonl", "c.txt", "a/b/x.TAR"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    inside = [f"{tmp_path}/{name}" for name in ("a/b/x.TAR", "a/z.parquet", "b.jsonl")]
    assert input_files([str(tmp_path / "b.jsonl"), str(tmp_path)]) == [f"{tmp_path}/b.jsonl", *inside]


def test_inputs_that_cannot_be_read(tmp_path):
    (tmp_path / "a.doc").touch()
    with pytest.raises(DataError, match=r"a\.doc: no reader .* known suffixes are .*\.jsonl.*\.tar"):
        input_files([str(tmp_path / "a.doc")])
    with pytest.raises(DataError, match="no file in this folder has a reader"):
        input_files([str(tmp_path)])
    with pytest.raises(DataError, match="absent: no such file or folder"):
        input_files([str(tmp_path / "absent")])
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(DataError, match=r"pipe\.jsonl: is neither a file nor a folder"):
        input_files([str(tmp_path / "pipe.jsonl")])
