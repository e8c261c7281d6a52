import pytest

from megavl.config.error import ConfigError
from megavl.config.files import DATASET_SUFFIXES, check_files
from tests.config.runs import make_run


class TestFiles:
    @pytest.fixture(autouse=True)
    def directory(self, monkeypatch, tmp_path):
        monkeypatch.chdir(tmp_path)
        self.path = tmp_path

    def problems(self, **changes) -> list[str]:
        with pytest.raises(ConfigError) as raised:
            check_files(make_run(**changes))
        assert str(self.path) in str(raised.value)
        return raised.value.problems

    def make_all(self):
        (self.path / "data").mkdir()
        for name in (
            "tokenizer.model",
            *(f"{kind}{end}" for kind in ("text", "multimodal") for end in DATASET_SUFFIXES),
        ):
            (self.path / "data" / name).touch()

    def test_all_there(self):
        self.make_all()
        check_files(make_run())

    def test_one_missing(self):
        self.make_all()
        (self.path / "data/text.idx").unlink()
        assert self.problems() == [
            "data.text[0].prefix: no file data/text.idx; make it with `python tools/preprocess_data.py --input "
            "DOCUMENTS.jsonl --output-prefix data/text --tokenizer data/tokenizer.model`"
        ]

    def test_quickstart_paths_name_its_command(self):
        data = {"tokenizer": "data/quickstart/tokenizer.model", "text": [{"prefix": "data/quickstart_vl2/text"}]}
        tokenizer, text, multimodal = self.problems(data=data)
        assert tokenizer == "data.tokenizer: no file data/quickstart/tokenizer.model; `make quickstart` makes it"
        assert text.startswith(
            "data.text[0].prefix: no file data/quickstart_vl2/text.bin, data/quickstart_vl2/text.idx"
        )
        assert text.endswith("`make quickstart MODEL=vl2` makes it")
        assert "preprocess_data.py" in multimodal

    def test_weights_to_start_from(self):
        self.make_all()
        (problem,) = self.problems(checkpoint={"init_from": "elsewhere"})
        assert "checkpoint.init_from: no directory elsewhere" in problem and "convert_checkpoint.py from-hf" in problem
        (self.path / "elsewhere").mkdir()
        check_files(make_run(checkpoint={"init_from": "elsewhere"}))


def test_an_output_dir_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    config = make_run(output_dir=str(tmp_path / "file" / "run"))
    with pytest.raises(ConfigError, match="output_dir = .*file is a file, so nothing could be written"):
        check_files(config)
