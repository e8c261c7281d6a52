import json

from megavl.config.run import TrainConfig
from megavl.data.sampler import Sampler
from megavl.runtime.reading import announce, report
from tests.data.conftest import corpus, model

__all__ = ["corpus", "model"]


def test_the_console_and_the_file_say_what_is_read(corpus, model, tmp_path, capsys):
    sampler = Sampler(corpus.data(), model, TrainConfig(steps=20, global_batch=4))
    announce(sampler, 7, ["text"])
    first, expected = capsys.readouterr().out.split("\n", 1)
    assert "this run's text packs" in first and "those before step 7 are packed again" in first
    assert expected == f"data of the whole run, as expected: {sampler.expected()}\n"

    report(sampler, 7, str(tmp_path))
    assert capsys.readouterr().out == f"data of 7 steps: {sampler.read(7).headline}\n"
    report(sampler, 20, str(tmp_path))
    assert capsys.readouterr().out == f"data of 20 steps: {sampler.read(20)}\n"
    assert [path.name for path in tmp_path.iterdir()] == ["data.json"]
    ledgers = json.loads((tmp_path / "data.json").read_text())
    assert ledgers["read"]["text_steps"] == ledgers["expected"]["text_steps"] == sampler.steps("text", 20)
    assert [entry["source"] for entry in ledgers["read"]["entries"]] == [
        corpus.prefix("text"),
        corpus.prefix("multimodal"),
    ]
    assert ledgers["read"]["entries"][0]["tokens"] == sampler.read(20).entries[0].tokens
