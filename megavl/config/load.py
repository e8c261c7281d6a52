"""A recipe and its overrides become a RunConfig.

A recipe is YAML by section. Its `model` is the name of a preset, or a mapping that says what differs from one:

    model:
      preset: vl_7b
      decoder: {layers: 4}
      sam: null                # no SAM branch

An override is `section.field=value`, to any depth, with the value written as in YAML.
"""

import difflib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import ValidationError

from megavl.config.error import ConfigError
from megavl.config.model import Section
from megavl.config.presets import PRESETS
from megavl.config.run import RunConfig

RECIPES = Path("launch/recipes")


def load_run(path: str | Path, overrides: Iterable[str] = ()) -> RunConfig:
    """Read a recipe and lay the overrides over it, in order.

    Raises ConfigError with every unknown key, bad value and malformed override at once.
    """
    raw = _read(Path(path))
    problems = []
    for override in overrides:
        problems += _override(raw, override)
    raw["model"], unknown = _resolve_model(raw.get("model"))
    problems += unknown
    # Strict JSON rules: `true` is not a 1 and "4" is not a 4, but a list is a tuple.
    try:
        config = RunConfig.model_validate_json(json.dumps(raw), strict=True)
    except ValidationError as error:
        problems += [line for defect in error.errors() for line in _explain(defect)]
    if problems:
        raise ConfigError(f"{path} cannot be run", problems)
    return config


def dump_run(config: RunConfig) -> dict[str, Any]:
    """The whole configuration in JSON types; `RunConfig.model_validate` makes an equal one of it."""
    return config.model_dump(mode="json")


def differences(before: dict[str, Any], now: dict[str, Any], section: str = "") -> list[str]:
    """What `dump_run` of two runs says differently, one line for each field."""
    lines = []
    for field in sorted(before.keys() | now.keys()):
        old, new = before.get(field), now.get(field)
        if isinstance(old, dict) and isinstance(new, dict):
            lines += differences(old, new, f"{section}{field}.")
        elif old != new:
            lines.append(f"{section}{field}: {old} -> {new}")
    return lines


class _Loader(yaml.SafeLoader):
    """YAML with the scalars of version 1.2 (`off` is a word, 3e-5 a number, 2024-01-01 a name), and each key once."""

    yaml_implicit_resolvers = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value:
            if str(key.value) in seen:
                line = key.start_mark.line + 1
                raise yaml.MarkedYAMLError(problem=f"key {key.value!r} is given twice, again in line {line}")
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


for _tag, _pattern in {
    "null": r"~|null|Null|NULL|",
    "bool": r"true|True|TRUE|false|False|FALSE",
    "int": r"[-+]?(0|[1-9][0-9]*)",
    "float": r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
}.items():
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_pattern})\Z"), None)


def _parse(text: str) -> Any:
    return yaml.load(text, _Loader)


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        known = ", ".join(sorted(str(recipe) for recipe in RECIPES.glob("*.yaml"))) or f"none in {RECIPES.resolve()}"
        raise ConfigError(f"no recipe {path}", [f"available recipes: {known}"])
    try:
        raw = _parse(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not a recipe", [" ".join(str(error).split())]) from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} is not a recipe", [f"expected sections (model, data, ...), found {raw!r:.60}"])
    return raw


def _override(raw: dict[str, Any], override: str) -> list[str]:
    """Lay one `a.b.c=value` into `raw`; returns what is wrong with it."""
    key, equals, text = override.partition("=")
    if not equals or not all(key.split(".")):
        return [f"override {override!r} is not of the form section.field=value"]
    try:
        value = _parse(text)
    except yaml.YAMLError as error:
        return [f"override {override!r}: the value is not YAML: {' '.join(str(error).split())}"]
    *sections, field = key.split(".")
    here = raw
    for depth, section in enumerate(sections):
        if depth == 0 and section == "model" and isinstance(here.get("model"), str):
            here["model"] = {"preset": here["model"]}
        if here.get(section) is None:
            here[section] = {}
        here = here[section]
        if not isinstance(here, dict):
            whole = ".".join(sections[: depth + 1])
            return [f"override {override!r}: {whole} is {here!r:.60} and has no fields; give it whole: {whole}=..."]
    here[field] = value
    return []


def _resolve_model(model: Any) -> tuple[Any, list[str]]:
    """The model section with its preset filled in, and what is wrong with the preset's name."""
    if isinstance(model, str):
        model = {"preset": model}
    if not isinstance(model, dict) or "preset" not in model:
        return model, []
    changes = {key: value for key, value in model.items() if key != "preset"}
    name = model["preset"]
    if name in PRESETS:
        return _merge(PRESETS[name].model_dump(mode="json"), changes), []
    # Any preset's shape lets the other sections be checked too; its own defects would only confuse.
    stand_in = next(iter(PRESETS.values())).model_dump(mode="json")
    return stand_in, [f"model.preset: no preset {name!r}; {_nearest(str(name), PRESETS)}"]


def _merge(base: Any, changes: Any) -> Any:
    if not (isinstance(base, dict) and isinstance(changes, dict)):
        return changes
    return base | {key: _merge(base.get(key), value) for key, value in changes.items()}


def _explain(defect: dict[str, Any]) -> list[str]:
    """Pydantic's account of one defect, as lines that say field, value and what is allowed."""
    path = [str(part) for part in defect["loc"]]
    name = ".".join(path)
    match defect["type"]:
        case "extra_forbidden":
            section = ".".join(path[:-1]) or "the recipe"
            known = _fields_at(defect["loc"][:-1])
            return [f"{name}: unknown key {path[-1]!r} in {section}; {_nearest(path[-1], known)}"]
        case "missing":
            return [f"{name}: required, and not given"]
        case "value_error":
            return [f"{name}: {line}" for line in str(defect["ctx"]["error"]).splitlines()]
    return [f"{name}: {defect['input']!r:.80} is not allowed: {defect['msg'][0].lower()}{defect['msg'][1:]}"]


def _fields_at(location: tuple[int | str, ...]) -> list[str]:
    """Keys of the section that a pydantic error location leads to."""
    section: type[Section] = RunConfig
    for part in location:
        if isinstance(part, str):
            section = _section_in(section.model_fields[part].annotation)
    return list(section.model_fields)


def _section_in(annotation: Any) -> type[Section] | None:
    """The section class inside `Section`, `Section | None` or `tuple[Section, ...]`."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return next((found for inner in get_args(annotation) if (found := _section_in(inner))), None)


def _nearest(key: str, known: Iterable[str]) -> str:
    known = list(known)
    close = difflib.get_close_matches(key, known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known are {', '.join(known)}"
