"""Every recipe loads and passes its own rules on the smallest world that holds it."""

from pathlib import Path

import pytest

from megavl.config.load import dump_run, load_run
from megavl.config.presets import PRESETS
from megavl.config.rules import check
from megavl.config.run import RunConfig

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "launch" / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_loads(recipe):
    config = load_run(recipe)
    check(config, config.parallel.model * config.parallel.expert)
    assert config.output_dir == f"runs/{recipe.stem}"


@pytest.mark.parametrize("name", PRESETS)
def test_preset_is_a_model_of_a_run(name):
    config = load_run(ROOT / "launch" / "recipes" / "quickstart.yaml", [f"model={name}"])
    assert config.model == PRESETS[name] and config.model.name == name
    assert RunConfig.model_validate(dump_run(config)) == config
