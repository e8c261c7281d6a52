"""constraints.txt has an exact version of every requirement in setup.py, within the range that setup.py supports."""

import runpy
from pathlib import Path
from unittest import mock

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[2]
# flash-attn is compiled against the toolkit of a machine; `make install` leaves it out.
NOT_INSTALLED = {"gpu"}


def requirements() -> list[Requirement]:
    """What setup.py requires, with the extras that `make install` may install."""
    with mock.patch("setuptools.setup") as setup:
        runpy.run_path(str(ROOT / "setup.py"))
    required, extras = setup.call_args.kwargs["install_requires"], setup.call_args.kwargs["extras_require"]
    for extra in extras.keys() - NOT_INSTALLED:
        required = [*required, *extras[extra]]
    return [Requirement(line) for line in required]


def exact(text: str) -> dict[str, Version]:
    """Versions by canonical name. Raises ValueError for a line that is not `name==version`."""
    versions = {}
    for line in text.splitlines():
        if line and not line.startswith("#"):
            name, _, version = line.partition("==")
            versions[canonicalize_name(name)] = Version(version)
    return versions


def problems(required: list[Requirement], constraints: dict[str, Version]) -> list[str]:
    """Requirements that the constraints do not have, or have outside their range; versions with a local label."""
    found = [f"{name} {version} has a local label" for name, version in constraints.items() if version.local]
    for requirement in required:
        version = constraints.get(canonicalize_name(requirement.name))
        if version is None:
            found.append(f"{requirement} is not constrained")
        elif version not in requirement.specifier:
            found.append(f"{requirement} excludes {version}")
    return found


def test_the_constraints_cover_setup_py():
    assert problems(requirements(), exact((ROOT / "constraints.txt").read_text())) == []


def test_setup_py_leaves_a_range_of_torch():
    """A cluster's own build of torch is kept."""
    (torch,) = (requirement for requirement in requirements() if requirement.name == "torch")
    assert [
        version
        for version in ("2.10.0", "2.11.0", "2.12.1+cu130", "2.13.0+cpu", "2.14.0")
        if version in torch.specifier
    ] == [
        "2.11.0",
        "2.12.1+cu130",
        "2.13.0+cpu",
    ]


@pytest.mark.parametrize(
    ("line", "constraints", "found"),
    [
        ("torch>=2.11,<2.14", "torch==2.14.0", ["torch<2.14,>=2.11 excludes 2.14.0"]),
        ("PyYAML~=6.0", "pyyaml==6.0.4", []),
        ("torch>=2.11,<2.14", "numpy==2.4.6", ["torch<2.14,>=2.11 is not constrained"]),
        ("torch>=2.11,<2.14", "torch==2.13.0+cpu", ["torch 2.13.0+cpu has a local label"]),
    ],
)
def test_a_difference_is_seen(line, constraints, found):
    assert problems([Requirement(line)], exact(constraints)) == found


def test_a_range_is_no_constraint():
    with pytest.raises(ValueError):
        exact("torch>=2.11")
