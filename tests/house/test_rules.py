"""The house keeps its rules, and each rule can fail."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.house import rules

ROOT = Path(__file__).parents[2]

# One file that breaks a rule, and the rule that must see it.
BREACHES = {
    "up a floor": (rules.wrong_direction, "megavl/config/a.py", "from megavl.model import vlm"),
    "up a floor, lazily": (rules.wrong_direction, "megavl/model/a.py", "def f():\n    import megavl.runtime.loop"),
    "across a floor": (rules.wrong_direction, "megavl/checkpoint/a.py", "import megavl.data.store"),
    "between ground rooms": (rules.wrong_direction, "megavl/parallel/a.py", "from megavl.config.run import RunConfig"),
    "relative": (rules.wrong_direction, "megavl/ops/a.py", "from ..model import vlm"),
    "by name": (
        rules.wrong_direction,
        "megavl/data/a.py",
        'import importlib\nimportlib.import_module("megavl.model.vlm")',
    ),
    "more than the topology": (rules.wrong_direction, "megavl/plan/a.py", "from megavl.parallel.groups import Axis"),
    "a room without a floor": (rules.wrong_direction, "megavl/attic/a.py", "import megavl.config.run"),
    "batch imports a room": (rules.wrong_direction, "megavl/batch.py", "from megavl.parallel import groups"),
    "a door from inside": (rules.doors_imported, "megavl/data/a.py", "import tools.preprocess_data"),
    "deepspeed in the model": (
        rules.deepspeed_elsewhere,
        "megavl/model/a.py",
        "def f():\n    from deepspeed import comm",
    ),
    "deepspeed in the runtime": (rules.deepspeed_elsewhere, "megavl/runtime/a.py", "import deepspeed"),
    "a private attribute": (rules.private_writes_elsewhere, "megavl/runtime/a.py", "def f(x):\n    x.inner._norm = 1"),
    "an item of one": (rules.private_writes_elsewhere, "megavl/model/a.py", "def f(self):\n    self._buffers['a'] = 1"),
    "deepspeed in a door": (rules.deepspeed_elsewhere, "launch/pretrain.py", "import deepspeed"),
    "environ": (rules.environment_read_elsewhere, "megavl/runtime/a.py", 'import os\nos.environ["RANK"]'),
    "getenv": (rules.environment_read_elsewhere, "tools/a.py", 'import os\nos.getenv("RANK")'),
    "environ by name": (rules.environment_read_elsewhere, "megavl/data/a.py", "from os import environ"),
    "global": (rules.ambient_state, "megavl/model/a.py", "x = 0\ndef f():\n    global x\n    x = 1"),
    "utils": (rules.empty_names, "megavl/data/utils.py", ""),
    "a folder of utils": (rules.empty_names, "tools/utils/a.py", ""),
}


@pytest.mark.parametrize("rule", rules.RULES, ids=lambda rule: rule.__name__)
def test_the_house_keeps(rule):
    assert rule(ROOT) == []


def test_every_room_is_looked_at():
    rooms = {path.parts[1] for path, _ in rules.sources(ROOT, "megavl") if len(path.parts) > 2}
    assert rooms >= {"config", "parallel", "ops", "model", "data", "plan", "checkpoint", "runtime", "rehearsal"}


@pytest.fixture
def tree(tmp_path):
    """A small house that keeps every rule."""
    for name, text in {
        "megavl/__init__.py": "",
        "megavl/batch.py": "import torch",
        "megavl/config/__init__.py": "",
        "megavl/config/run.py": "from megavl.config import model",
        "megavl/config/model.py": "",
        "megavl/parallel/__init__.py": "",
        "megavl/parallel/topology.py": "",
        "megavl/parallel/groups.py": "from megavl.parallel.topology import Topology",
        "megavl/model/__init__.py": "",
        "megavl/model/vlm.py": "from megavl.batch import Batch\nfrom megavl.config.model import ModelConfig",
        "megavl/plan/cost.py": "from megavl.parallel.topology import Topology",
        "megavl/runtime/env.py": 'import os\nos.environ["RANK"]',
        "megavl/runtime/deepspeed/engine.py": "def f(engine):\n    import deepspeed\n    engine._norm = 1",
        "megavl/runtime/loop.py": "class A:\n    def __init__(self):\n        self._a = {}\n        self._a[0] = 1",
        "launch/pretrain.py": "from megavl.runtime.deepspeed.engine import f",
        "tools/benchmark.py": "from megavl.plan import cost",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


@pytest.mark.parametrize("rule", rules.RULES, ids=lambda rule: rule.__name__)
def test_a_good_tree_passes(rule, tree):
    assert rule(tree) == []


@pytest.mark.parametrize(("rule", "path", "text"), BREACHES.values(), ids=BREACHES)
def test_a_breach_is_seen(rule, path, text, tree):
    (tree / path).parent.mkdir(parents=True, exist_ok=True)
    (tree / path).write_text(text)
    (violation,) = rule(tree)
    assert violation.startswith(path)


def test_a_cycle_is_seen(tree):
    (tree / "megavl/config/model.py").write_text("def f():\n    from megavl.config import run")
    (cycle,) = rules.cycles(tree)
    assert "megavl.config.run" in cycle and "megavl.config.model" in cycle


def test_planning_needs_no_torch():
    """A plan is made on a laptop or a login node: neither torch nor deepspeed is imported."""
    files = [path for path, _ in rules.sources(ROOT, "megavl/plan", "megavl/config") if path.stem != "__init__"]
    modules = ", ".join(["megavl.parallel.topology", *map(rules.module_name, files)])
    code = f"import sys, {modules}\nprint(sys.modules.keys() & {{'torch', 'deepspeed'}})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
