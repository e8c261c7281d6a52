import json

import pytest

from megavl.config.error import ConfigError
from megavl.config.load import differences, dump_run, load_run
from megavl.config.presets import PRESETS
from megavl.config.run import RunConfig
from tests.config.runs import RUN


@pytest.fixture
def recipe(tmp_path):
    """Writes a recipe; a mapping is the small run with these sections replaced, a string is the file as it is."""

    def write(content: dict | str):
        path = tmp_path / "recipe.yaml"
        path.write_text(content if isinstance(content, str) else json.dumps(RUN | content))
        return path

    return write


def problems(path, *overrides):
    with pytest.raises(ConfigError) as raised:
        load_run(path, overrides)
    assert all(problem in str(raised.value) for problem in raised.value.problems)
    return raised.value.problems


def only_problem(path, *overrides):
    (problem,) = problems(path, *overrides)
    return problem


class TestPreset:
    def test_by_name(self, recipe):
        assert load_run(recipe({"model": "vl_7b"})).model == PRESETS["vl_7b"]

    def test_with_changes_deep_inside(self, recipe):
        model = load_run(
            recipe({"model": {"preset": "vl_7b", "decoder": {"layers": 4}, "siglip": {"layers": 2}}})
        ).model
        assert (model.decoder.layers, model.siglip.layers) == (4, 2)
        assert model.decoder.width == 4096 and model.siglip.width == 1024

    def test_null_removes_sam_and_a_mapping_adds_it(self, recipe):
        assert load_run(recipe({"model": {"preset": "vl_7b", "sam": None}})).model.sam is None
        assert load_run(recipe({"model": {"preset": "vl_1b", "sam": {"layers": 12}}})).model.sam == PRESETS["vl_7b"].sam

    def test_unknown(self, recipe):
        assert only_problem(recipe({"model": "vl_7"})) == "model.preset: no preset 'vl_7'; did you mean 'vl_7b'?"

    def test_unknown_does_not_hide_other_problems(self, recipe):
        found = problems(recipe({"model": {"preset": "llava"}}), "train.steps=0")
        assert found[0] == f"model.preset: no preset 'llava'; known are {', '.join(PRESETS)}"
        assert found[1].startswith("train.steps: 0 is not allowed")

    def test_whole_model_without_preset(self, recipe):
        assert load_run(recipe({})).model == PRESETS["vl_debug"]


class TestOverride:
    def test_values_are_yaml(self, recipe):
        config = load_run(
            recipe({}),
            [
                "parallel.stages=[2,3]",
                "parallel.sequence=true",
                "optim.lr=3e-5",
                "train.recompute=off",
                "data.text=[{prefix: a, weight: 2}, {prefix: b}]",
                "checkpoint.init_from=null",
                "output_dir=2024-01-01",
            ],
        )
        assert config.parallel.stages == (2, 3) and config.parallel.sequence is True
        assert config.optim.lr == 3e-5 and config.train.recompute == "off"
        assert [(source.prefix, source.weight) for source in config.data.text] == [("a", 2.0), ("b", 1.0)]
        assert config.checkpoint.init_from is None and config.output_dir == "2024-01-01"

    def test_reaches_into_a_preset_given_by_name(self, recipe):
        config = load_run(recipe({"model": "vl_debug"}), ["model.decoder.layers=4", "model.sam.layers=5"])
        assert config.model.decoder.layers == 4 and config.model.sam.layers == 5

    def test_model_by_name(self, recipe):
        assert load_run(recipe({"model": "vl_debug"}), ["model=vl_1b"]).model == PRESETS["vl_1b"]

    def test_opens_a_section_that_the_recipe_leaves_out(self, recipe):
        assert load_run(recipe({}), ["optim.schedule.shape=step"]).optim.schedule.shape == "step"

    def test_the_last_one_holds(self, recipe):
        assert load_run(recipe({}), ["train.steps=5", "train.steps=6"]).train.steps == 6

    @pytest.mark.parametrize("override", ["train.steps", "=5", "train..steps=5"])
    def test_malformed(self, recipe, override):
        assert only_problem(recipe({}), override) == f"override {override!r} is not of the form section.field=value"

    def test_value_that_is_not_yaml(self, recipe):
        assert only_problem(recipe({}), "train.steps=[1").startswith(
            "override 'train.steps=[1': the value is not YAML: while parsing"
        )

    def test_into_a_list(self, recipe):
        assert only_problem(recipe({}), "data.text.0.prefix=x") == (
            "override 'data.text.0.prefix=x': data.text is [{'prefix': 'data/text'}] and has no fields; give it whole: "
            "data.text=..."
        )


class TestMistake:
    @pytest.mark.parametrize(
        ("override", "problem"),
        [
            ("train.step=3", "train.step: unknown key 'step' in train; did you mean 'steps'?"),
            ("paralel.tensor=2", "paralel: unknown key 'paralel' in the recipe; did you mean 'parallel'?"),
            ("model.sam.widow=2", "model.sam.widow: unknown key 'widow' in model.sam; did you mean 'window'?"),
            (
                "optim.rules=[{match: stem, lr: 0}]",
                "optim.rules.0.lr: unknown key 'lr' in optim.rules.0; known are match, lr_multiplier",
            ),
            ("parallel.zero=5", "parallel.zero: 5 is not allowed: input should be 0, 1, 2 or 3"),
            (
                "train.recompute=full",
                "train.recompute: 'full' is not allowed: input should be 'off', 'selective' or 'block'",
            ),
            ("train.precision=fp16", "train.precision: 'fp16' is not allowed: input should be 'fp32' or 'bf16'"),
            ("parallel.tensor=0", "parallel.tensor: 0 is not allowed: input should be greater than 0"),
            (
                "data.text_ratio=1.5",
                "data.text_ratio.final: 1.5 is not allowed: input should be less than or equal to 1",
            ),
            # What a lenient reader would take for a number.
            ("parallel.tensor=true", "parallel.tensor: True is not allowed: input should be a valid integer"),
            ("parallel.tensor='2'", "parallel.tensor: '2' is not allowed: input should be a valid integer"),
            ("parallel.sequence=yes", "parallel.sequence: 'yes' is not allowed: input should be a valid boolean"),
            ("optim.lr=.inf", "optim.lr: inf is not allowed: input should be a finite number"),
        ],
    )
    def test_says_field_value_and_what_is_allowed(self, recipe, override, problem):
        assert only_problem(recipe({}), override) == problem

    def test_missing_field(self, recipe):
        assert only_problem(recipe({"train": {"steps": 5}})) == "train.global_batch: required, and not given"

    def test_all_at_once(self, recipe):
        found = problems(recipe({"trian": {}}), "nonsense", "parallel.zero=7", "optim.beta=1", "data.seq_len=x")
        assert len(found) == 5
        for part in ("nonsense", "parallel.zero", "optim.beta", "data.seq_len", "trian"):
            assert sum(part in problem for problem in found) == 1


class TestFile:
    def test_missing_names_the_recipes(self, monkeypatch, tmp_path):
        monkeypatch.chdir(tmp_path)
        assert only_problem("typo.yaml") == f"available recipes: none in {tmp_path}/launch/recipes"
        (tmp_path / "launch/recipes").mkdir(parents=True)
        (tmp_path / "launch/recipes/small.yaml").touch()
        assert only_problem("typo.yaml") == "available recipes: launch/recipes/small.yaml"

    def test_key_given_twice(self, recipe):
        path = recipe("train:\n  steps: 1\n  steps: 2\n")
        assert only_problem(path) == "key 'steps' is given twice, again in line 3"

    @pytest.mark.parametrize(("content", "part"), [("[1, 2]", "found [1, 2]"), ("", "found None"), ("a: [", "line 1")])
    def test_not_a_recipe(self, recipe, content, part):
        with pytest.raises(ConfigError, match="is not a recipe"):
            load_run(recipe(content))
        assert part in only_problem(recipe(content))

    def test_scalars_are_those_of_yaml_1_2(self, recipe):
        config = load_run(recipe({}), ["output_dir=no", "optim.eps=1e-9", "train.seed=0", "optim.lr=.5"])
        assert config.output_dir == "no" and config.optim.eps == 1e-9 and config.train.seed == 0
        assert config.optim.lr == 0.5


def test_dump_gives_the_same_run_again(recipe):
    config = load_run(recipe({}), ["parallel.pipeline=2", "parallel.stages=[12,12]", "model.sam=null"])
    dumped = dump_run(config)
    assert RunConfig.model_validate(json.loads(json.dumps(dumped))) == config


def test_differences_of_two_runs_name_their_fields():
    before = {"train": {"steps": 2, "seed": 0}, "parallel": {"stages": None}, "output_dir": "a"}
    now = {"train": {"steps": 3, "seed": 0}, "parallel": {"stages": [1, 2]}, "output_dir": "a"}
    assert differences(before, now) == ["parallel.stages: None -> [1, 2]", "train.steps: 2 -> 3"]
    assert differences(now, now) == []
