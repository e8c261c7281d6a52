import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from megavl.data.construct.collect import Summary, collect, find
from megavl.data.construct.sample import Dropped, Sample
from megavl.data.errors import DataError
from tests.data.readers.reading import documents


@dataclass(frozen=True)
class Copies:
    """As many samples of a file as its name says, or a drop. `folder` is that of the test: its file `work` lists what
    was worked on, and where its file `trouble` names an input, that one stops the run or ends its process."""

    folder: str
    suffixes: tuple[str, ...] = (".txt",)

    def samples(self, paths: Sequence[str]) -> Iterator[Sample | Dropped]:
        trouble = Path(self.folder) / "trouble"
        what, where = trouble.read_text().split() if trouble.exists() else ("", "")
        for path in paths:
            with (Path(self.folder) / "work").open("a") as log:
                log.write(f"{path}\n")
            if path == where:
                if what == "stop":
                    raise KeyboardInterrupt
                os._exit(1)
            number, text = int(Path(path).stem), Path(path).read_text()
            for index in range(number % 3):
                yield Sample(f"{path}:{index}", f"image of {text}".encode(), ".png", f"{text} \u4e2d")
            if number % 3 == 0:
                yield Dropped(path, "none", f"a\tb\n{text}")


@pytest.fixture
def paths(tmp_path):
    """So many files that they are three parts."""
    (tmp_path / "in").mkdir()
    for number in range(150):
        (tmp_path / "in" / f"{number:03}.txt").write_text(f"text {number}")
    return find([str(tmp_path / "in")], (".txt",))


def run(paths, output, workers=1):
    return collect(Copies(str(output.parent)), paths, str(output), workers, lambda files, summary: None)


def worked_on(folder):
    """The inputs since the last call."""
    log = folder / "work"
    lines = log.read_text().splitlines()
    log.unlink()
    return lines


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_samples_are_documents_that_are_read_as_any_others(paths, tmp_path):
    reports = []
    summary = collect(Copies(str(tmp_path)), paths, str(tmp_path / "out"), 1, lambda *report: reports.append(report))
    assert summary == Summary(150, Counter({"none": 50}))
    assert [files for files, _ in reports] == [64, 64, 22]
    assert reports[-1][1] == summary
    found = documents(tmp_path / "out" / "documents.jsonl")
    assert [document.key for document in found[:3]] == [f"{paths[1]}:0", f"{paths[2]}:0", f"{paths[2]}:1"]
    image, text = found[-1].segments
    assert (image.data, text.text) == (b"image of text 149", "text 149 \u4e2d")
    lines = (tmp_path / "out" / "dropped.tsv").read_text().splitlines()
    assert lines[1] == f"none\t{paths[3]}\ta b text 3" and len(lines) == 50
    assert {path.name for path in tmp_path.iterdir()} == {"in", "out", "work"}


def test_the_output_does_not_depend_on_the_number_of_workers(paths, tmp_path):
    for workers in (1, 2):
        run(paths, tmp_path / str(workers), workers)
    assert contents(tmp_path / "1") == contents(tmp_path / "2")


@pytest.mark.parametrize(("what", "workers", "error"), [("stop", 1, KeyboardInterrupt), ("die", 2, DataError)])
def test_an_unfinished_run_goes_on_without_its_finished_parts(paths, tmp_path, what, workers, error):
    run(paths, tmp_path / "whole")
    (tmp_path / "trouble").write_text(f"{what} {paths[140]}")
    with pytest.raises(error):
        run(paths, tmp_path / "out", workers)
    assert not (tmp_path / "out").exists()
    finished = {int(path.name[:5]) for path in (tmp_path / "out.partial" / "parts").glob("*.jsonl")}
    (tmp_path / "trouble").unlink()
    worked_on(tmp_path)
    run(paths, tmp_path / "out", workers)
    parts = {0: paths[:64], 1: paths[64:128], 2: paths[128:]}
    assert 2 not in finished
    assert sorted(worked_on(tmp_path)) == sorted(path for part in parts.keys() - finished for path in parts[part])
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert not (tmp_path / "out.partial").exists()


def test_an_unfinished_run_is_not_taken_over_by_another(paths, tmp_path):
    (tmp_path / "trouble").write_text(f"stop {paths[70]}")
    with pytest.raises(KeyboardInterrupt):
        run(paths, tmp_path / "out")
    with pytest.raises(DataError, match="out.partial is of an unfinished run with other input files or options"):
        run(paths[1:], tmp_path / "out")
    Path(paths[3]).write_text("a longer text 3")
    with pytest.raises(DataError, match="remove it to begin anew"):
        run(paths, tmp_path / "out")


def test_an_existing_output_is_kept(paths, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(DataError, match="out exists; remove it or choose another --output"):
        run(paths, tmp_path / "out")


def test_inputs_are_files_and_folders(paths, tmp_path):
    (tmp_path / "in" / "deep").mkdir()
    (tmp_path / "in" / "deep" / "B.TXT").write_text("")
    (tmp_path / "in" / "other.png").write_text("")
    assert find([paths[9], str(tmp_path / "in")], (".txt",)) == [paths[9], *paths, str(tmp_path / "in/deep/B.TXT")]


@pytest.mark.parametrize(
    ("name", "message"),
    [("absent", "no such file"), ("in/other.png", "is not .txt"), ("empty", "no .txt file below")],
)
def test_inputs_that_cannot_be_used_are_named(paths, tmp_path, name, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "in" / "other.png").write_text("")
    with pytest.raises(DataError, match=message):
        find([str(tmp_path / name)], (".txt",))
