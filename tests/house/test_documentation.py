"""Every command line in the documentation can be typed: its scripts, recipes, options and overrides exist."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from megavl.config.load import load_run

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
COMMAND = re.compile(r"(?:\$ )?(?:[A-Z_]+=\S* )*((?:\S*/)?(?:python|deepspeed|torchrun|srun|make|docker) .*)")
# A transcript may show what a mistake gets: the line after the command.
MISTAKE = "error:"


def command_lines(text):
    """The words of each command line in the fenced blocks of a page, without those that are shown failing."""
    found = []
    for block in re.findall(r"^```[a-z]*\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        lines = block.replace("\\\n", " ").splitlines()
        for line, following in zip(lines, [*lines[1:], ""], strict=True):
            if (command := COMMAND.fullmatch(line)) and not following.startswith(MISTAKE):
                found.append(shlex.split(command[1], comments=True))
    return found


def written_recipes(text, folder):
    """The recipes that a page tells the reader to write (their name ends the line before the block), by name."""
    found = {}
    for name, recipe in re.findall(r"`(\w+\.yaml)`[^\n]*\n\n```yaml\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        found[name] = folder / name
        found[name].write_text(recipe)
    return found


def problems(words, recipes, root=ROOT):
    """What of a command line exists neither in the tree nor among the recipes that the page has the reader write."""
    if words[0] == "make":
        rules = re.findall(r"^([a-z-]+):", (root / "Makefile").read_text(), re.MULTILINE)
        return [f"no make target {target}" for target in words[1:] if "=" not in target and target not in rules]
    if words[0] == "docker":
        files = [words[i + 1] for i, word in enumerate(words) if word == "-f"]
        return [f"no file {name}" for name in files if not (root / name).is_file()]
    script = next((word for word in words if word.endswith(".py")), None)
    if script is None:
        return []
    if not (root / script).is_file():
        return [f"no script {script}"]
    found, source = [], (root / script).read_text()
    arguments = words[words.index(script) + 1 :]
    found += [
        f"{script} has no option {argument}"
        for argument in arguments
        if argument.startswith("--") and f'"{argument.partition("=")[0]}"' not in source
    ]
    if "--config" in arguments:
        recipe = arguments[arguments.index("--config") + 1]
        # An option such as --vs takes several in one word.
        overrides = [each for word in arguments if re.match(r"[a-z_.]+=", word) for each in word.split()]
        try:
            load_run(recipes.get(recipe, root / recipe), overrides)
        except ValueError as error:
            found.append(str(error))
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_exist(page, tmp_path):
    text = page.read_text()
    recipes = written_recipes(text, tmp_path)
    assert [(words, found) for words in command_lines(text) if (found := problems(words, recipes))] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text())
    assert [link for link in links if "://" not in link and not (page.parent / link).exists()] == []


def quoted_dry_runs(text: str) -> list[tuple[str, str]]:
    """Commands of dry runs in the code blocks of a page, each with the output that the page quotes."""
    blocks = re.findall(r"^```\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    sessions = [each for block in blocks for each in re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", block, re.MULTILINE)]
    return [(command, output) for command, output in sessions if "--dry-run" in command]


def test_quoted_dry_runs_print_what_is_quoted():
    sessions = [session for page in PAGES for session in quoted_dry_runs(page.read_text())]
    assert len(sessions) >= 3
    for command, quoted in sessions:
        words = [sys.executable, *shlex.split(command)[1:]]
        done = subprocess.run(
            words, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
        )
        assert (done.stdout + done.stderr).startswith(quoted.strip()), command


def test_the_readme_has_commands_to_check():
    assert len(command_lines((ROOT / "README.md").read_text())) >= 12


@pytest.mark.parametrize(
    "line",
    [
        "make quickstrat",
        "python tools/preproces.py --input x",
        "python tools/preprocess_data.py --inputs x",
        "deepspeed launch/pretrain.py --config launch/recipes/none.yaml",
        "$ DS_ACCELERATOR=cpu deepspeed launch/pretrain.py --config launch/recipes/vl_debug.yaml parallel.tensr=2",
        "docker build -f docker/Dockerfile.gpu .",
    ],
)
def test_a_command_that_does_not_exist_is_seen(line):
    (words,) = command_lines(f"text\n```\n{line}\n```\n")
    assert problems(words, {})


@pytest.mark.parametrize(("steps", "found"), [("steps", 0), ("stepz", 1)])
def test_a_recipe_of_the_page_is_loaded(steps, found, tmp_path):
    text = (ROOT / "launch" / "recipes" / "vl_debug.yaml").read_text().replace("steps:", f"{steps}:")
    recipes = written_recipes(f"This is `own.yaml`:\n\n```yaml\n{text}```\n", tmp_path)
    assert len(problems(["python", "launch/pretrain.py", "--config", "own.yaml"], recipes)) == found
