import os

import pytest

from megavl.data.errors import DataError
from megavl.data.readers.files import read_image
from tests.data.readers.reading import PICTURE, documents, read, write_jsonl


@pytest.fixture
def folder(tmp_path):
    """in/ with a picture and links, beside a picture that is outside of it."""
    inside = tmp_path / "in"
    (inside / "deep").mkdir(parents=True)
    (inside / "a.png").write_bytes(PICTURE)
    (tmp_path / "out.png").write_bytes(PICTURE)
    (inside / "to_a.png").symlink_to("a.png")
    (inside / "to_out.png").symlink_to("../out.png")
    (inside / "to_all").symlink_to("/")
    (inside / "to_itself").symlink_to("to_itself")
    return inside


@pytest.mark.parametrize("reference", ["a.png", "./a.png", "deep/../a.png", "to_a.png"])
def test_images_below_the_folder_are_read(folder, reference):
    assert read_image(str(folder), reference, 1000) == PICTURE


def test_the_folder_itself_may_be_reached_by_a_link(folder, tmp_path):
    (tmp_path / "link").symlink_to("in")
    assert read_image(str(tmp_path / "link"), "a.png", 1000) == PICTURE


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("../out.png", "is outside of .*/in, the folder of the input file"),
        ("deep/../../out.png", "is outside of"),
        ("..", "is outside of"),
        ("/etc/passwd", "is outside of"),
        ("to_out.png", "is outside of"),
        ("to_all/etc/passwd", "is outside of"),
        ("to_itself", "cannot be read"),
        ("absent.png", r"absent\.png cannot be read \(No such file"),
        ("a.png/x", "cannot be read \\(Not a directory"),
        ("x" * 5000, "cannot be read \\(File name too long"),
        ("deep", "deep is not a regular file"),
        (".", "is not a regular file"),
        ("pipe", "is not a regular file"),
        ("large", r"has 2,000 bytes, more than --max-record-bytes 1,000"),
        ("https://example.org/a.png", "is a URL, and nothing is downloaded"),
        ("file:///etc/passwd", "is a URL"),
        ("data:image/png;base64,AAAA", "is a URL"),
    ],
)
def test_references_that_are_refused(folder, reference, message):
    os.mkfifo(folder / "pipe")
    (folder / "large").write_bytes(bytes(2000))
    with pytest.raises(DataError, match=message):
        read_image(str(folder), reference, 1000)


def test_paths_of_a_record_are_relative_to_its_file(folder):
    path = write_jsonl(folder / "deep" / "a.jsonl", {"image": "../a.png", "text": "x"})
    (error,) = read(path)
    assert "is outside of" in str(error) and str(error).startswith(f"{path}:1: image 0: image ../a.png")
    assert documents(write_jsonl(folder / "a.jsonl", {"image": "a.png", "text": "x"}))


def test_a_file_of_the_working_directory(folder, monkeypatch):
    monkeypatch.chdir(folder)
    write_jsonl(folder / "a.jsonl", {"image": "a.png", "text": "x"}, {"image": "../out.png", "text": "x"})
    good, error = read("a.jsonl")
    assert good.segments[0].data == PICTURE
    assert "is outside of ., the folder of the input file" in str(error)
