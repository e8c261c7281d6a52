"""The build: one dataset, whatever does the work and however the input is cut."""

import json
import os
import signal
import time
from functools import partial
from pathlib import Path

import pytest

from megavl.data.build import build, shard_bytes
from megavl.data.engines import local
from megavl.data.errors import DataError
from megavl.data.fast_tokenizer import FastTokenizer
from megavl.data.sentencepiece_model import SentencePieceModel
from megavl.data.store import Store
from tests.data import tokenizer_files
from tests.data.conftest import write_jsonl
from tests.data.stores import contents, records


def inputs(corpus) -> list[str]:
    return [str(corpus.root / f"{name}.jsonl") for name in ("text", "multimodal", "more")]


@pytest.fixture(scope="module")
def expected(corpus, tmp_path_factory) -> Store:
    """All inputs in one shard."""
    prefix = str(tmp_path_factory.mktemp("expected") / "p")
    build(inputs(corpus), prefix, corpus.tokenizer)
    return Store(prefix)


@pytest.mark.parametrize(("workers", "part_bytes"), [(1, 1000), (2, 1000), (3, 5000)])
def test_the_dataset_depends_neither_on_workers_nor_on_shards(corpus, expected, tmp_path, workers, part_bytes):
    """Most shards are text of uint16 here, some multimodal."""
    counts = build(
        inputs(corpus),
        str(tmp_path / "p"),
        corpus.tokenizer,
        engine=partial(local.run, workers=workers),
        part_bytes=part_bytes,
    )
    store = Store(str(tmp_path / "p"))
    store.verify()
    assert contents(tmp_path / "p") == contents(expected.prefix)
    assert records(store) == records(expected)
    assert (counts.documents, counts.images) == (len(expected), expected.meta.images) == (280, 65)
    assert counts.input_bytes == sum(Path(path).stat().st_size for path in inputs(corpus))
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["p.bin", "p.idx", "p.meta"]


def test_ray_and_this_machine_make_the_same_shards(corpus, expected, tmp_path):
    """A record ends the run on a cluster; what is finished there is used, and not made again, here."""
    ray = pytest.importorskip("megavl.data.engines.ray", reason="needs the package ray", exc_type=ImportError)
    bad = write_jsonl(tmp_path / "bad.jsonl", [{"text": 3, "note": "a shard of its own" * 300}])
    arguments = ([*inputs(corpus), bad], str(tmp_path / "p"), corpus.tokenizer)
    with pytest.raises(DataError, match=f'^{bad}:1: "text" is a number'):
        build(*arguments, part_bytes=5000, engine=partial(ray.run, workers=2))
    counts = build(*arguments, part_bytes=5000, max_bad=1)
    assert counts.reused_bytes == sum(Path(path).stat().st_size for path in inputs(corpus))
    assert contents(tmp_path / "p") == contents(expected.prefix)


def test_a_shard_is_made_again_when_its_input_changed_or_it_is_damaged(corpus, tmp_path):
    files = [Path(write_jsonl(tmp_path / f"{text}.jsonl", [{"text": text}])) for text in ("a", "bb", "ccc")]
    arguments = ([str(path) for path in files], str(tmp_path / "p"), corpus.tokenizer)

    def stopped(work, shards):
        yield from map(work, shards)
        raise DataError("stopped")

    with pytest.raises(DataError, match="stopped"):
        build(*arguments, part_bytes=1, engine=stopped)
    write_jsonl(files[1], [{"text": "dddd"}])
    for report in (tmp_path / "p.parts").glob("*/counts.json"):
        if json.loads(report.read_text())["input_bytes"] == files[2].stat().st_size:
            report.with_name("part.bin").write_bytes(b"")
    assert build(*arguments, part_bytes=1).reused_bytes == files[0].stat().st_size
    build(arguments[0], str(tmp_path / "q"), corpus.tokenizer)
    assert contents(tmp_path / "p") == contents(tmp_path / "q")


def test_many_small_files_are_one_shard_and_blank_ones_none(corpus, tmp_path):
    for number in range(20):
        write_jsonl(tmp_path / "in" / f"{number:02}.jsonl", [{"text": "a"}] * (number % 2))
    made = []

    def noting(work, shards):
        for shard in shards:
            made.append(len(shard.parts))
            yield work(shard)

    build([str(tmp_path / "in")], str(tmp_path / "p"), corpus.tokenizer, engine=noting)
    assert made == [10]
    (tmp_path / "in" / "blank.jsonl").write_text("\n \n")
    build([str(tmp_path / "in")], str(tmp_path / "q"), corpus.tokenizer, part_bytes=1)
    assert records(Store(str(tmp_path / "p"))) == records(Store(str(tmp_path / "q")))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("blank",), "blank.jsonl: there is no document in the input"),
        (("good", "good"), "good.jsonl is 2 times in the input, .* larger weight"),
        (("absent",), "absent.jsonl: no such file"),
    ],
)
def test_an_input_of_which_no_dataset_can_be_made_is_refused(corpus, tmp_path, names, message):
    (tmp_path / "blank.jsonl").write_text("\n")
    write_jsonl(tmp_path / "good.jsonl", [{"text": "a"}])
    before = sorted(tmp_path.iterdir())
    with pytest.raises(DataError, match=message):
        build([str(tmp_path / f"{name}.jsonl") for name in names], str(tmp_path / "p"), corpus.tokenizer)
    assert sorted(tmp_path.iterdir()) == before


def test_a_worker_that_is_killed_is_an_error_and_no_hang():
    with pytest.raises(DataError, match="a worker process died"):
        list(local.run(_die, range(5), workers=2))


def _die(task):
    os.kill(os.getpid(), signal.SIGKILL)


def test_results_come_in_the_order_of_the_tasks_and_few_are_taken_ahead():
    taken = []

    def tasks():
        for number in range(40):
            taken.append(number)
            yield number

    results = local.run(_slow_first, tasks(), workers=2)
    assert next(results) == 0
    assert len(taken) <= 33
    assert list(results) == list(range(1, 40))


def _slow_first(number):
    time.sleep(0.3 * (number == 0))
    return number


@pytest.mark.parametrize(
    ("input_bytes", "expected"), [(0, 8), (8 << 30, 16), (100 << 30, 128), (1 << 40, 256), (1 << 50, 256)]
)
def test_shards_are_a_thousandth_of_the_input_within_limits(input_bytes, expected):
    assert shard_bytes(input_bytes) == expected << 20


def test_a_shard_whose_text_gigatoken_would_read_otherwise_is_left_to_the_tokenizer_itself(tmp_path, monkeypatch):
    tokenizer = str(tokenizer_files.write_sentencepiece(tmp_path / "t.model"))
    paths = [
        write_jsonl(tmp_path / f"{name}.jsonl", [{"text": f"{name} {number}"} for number in range(9)])
        for name in ("some", "rare", "more")
    ]
    plain = build(paths, str(tmp_path / "plain"), tokenizer, plain_tokenizer=True)
    assert plain.backends == (SentencePieceModel.name,)
    right = FastTokenizer.encode_batch

    def wrong(self, texts):
        return [ids[:-1] if "rare" in text else ids for text, ids in zip(texts, right(self, texts), strict=True)]

    monkeypatch.setattr(FastTokenizer, "encode_batch", wrong)
    fast = build(paths, str(tmp_path / "fast"), tokenizer, part_bytes=os.path.getsize(paths[0]))
    assert [backend.startswith("gigatoken") for backend in fast.backends] == [True, False]
    assert "without gigatoken" in fast.backends[1] and "'rare 0'" in fast.backends[1]
    assert contents(tmp_path / "fast") == contents(tmp_path / "plain")
