"""What `pyproject.toml` requires, and that CI runs what it promises."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from ruamel.yaml import YAML

import finetuning_scheduler

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def requirements(name: str) -> list[Requirement]:
    """What the package and its extras require of another package."""
    lists = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
    everything = [Requirement(text) for texts in lists for text in texts]
    return [requirement for requirement in everything if canonicalize_name(requirement.name) == name]


@pytest.mark.parametrize(
    ("name", "version", "why"),
    [
        ("torch", "2.11.0", "a layer thawed under torch.compile silently got no gradient"),
        ("lightning", "2.6.2", "malware"),
        ("lightning", "2.6.3", "malware"),
        ("pytorch-lightning", "2.6.2", "malware"),
        ("pytorch-lightning", "2.6.3", "malware"),
    ],
)
def test_version_is_refused(name: str, version: str, why: str) -> None:
    found = requirements(name)
    assert found, f"nothing requires {name} any more"
    assert [str(each) for each in found if each.specifier.contains(version)] == [], f"{name} {version}: {why}"


@pytest.mark.parametrize(
    ("name", "version"),
    [("torch", "2.12.0"), ("lightning", "2.6.0"), ("lightning", "2.6.4"), ("pytorch-lightning", "2.6.4")],
)
def test_version_is_allowed(name: str, version: str) -> None:
    assert [str(each) for each in requirements(name) if each.specifier.contains(version)]


def test_a_requirement_for_the_2x_package_of_this_name_is_met() -> None:
    assert Requirement("finetuning-scheduler>=2").specifier.contains(finetuning_scheduler.__version__)


def test_extras_that_programs_ask_for_exist() -> None:
    extras = PROJECT["optional-dependencies"]
    assert {"all", "extra", "ipynb", "examples", "cli"} <= extras.keys()
    own = [Requirement(text) for texts in extras.values() for text in texts if text.startswith("finetuning-scheduler")]
    assert own
    assert [str(each) for each in own if not each.extras <= extras.keys()] == []
    for_users = extras.keys() - {"all", "dev", "docs"}
    assert included("all") == for_users


def included(extra: str) -> set[str]:
    """The extras that one brings along, also by way of others."""
    asked = [Requirement(text) for text in PROJECT["optional-dependencies"][extra]]
    direct = {name for each in asked if each.name == PROJECT["name"] for name in each.extras}
    return direct.union(*(included(name) for name in direct))


def test_everything_that_users_can_ask_for_is_pinned() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {canonicalize_name(Requirement(line).name) for line in lines if line[0] != "#"}
    lists = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
    everything = [text for texts in lists for text in texts]
    names = {canonicalize_name(Requirement(text).name) for text in everything} - {PROJECT["name"]}
    assert names - pinned == set()


def test_every_pinned_version_is_allowed() -> None:
    pins = [
        Requirement(line)
        for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
        if line[0] != "#"
    ]
    refused = [
        f"{pin} by {required}"
        for pin in pins
        for required in requirements(canonicalize_name(pin.name))
        for exact in pin.specifier
        if not required.specifier.contains(exact.version)
    ]
    assert pins
    assert refused == []


def test_ci_runs_the_tests_on_every_python_that_the_metadata_name() -> None:
    named = [each.rpartition(" ")[2] for each in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", each)]
    workflow = YAML(typ="safe").load(ROOT / ".github" / "workflows" / "ci.yml")
    assert named
    assert workflow["jobs"]["tests"]["strategy"]["matrix"]["python"] == named
    assert PROJECT["requires-python"] == f">={named[0]}"


def test_the_command_is_installed_from_the_function_that_runs_it() -> None:
    from finetuning_scheduler.cli.app import main

    assert PROJECT["scripts"] == {"fts": f"{main.__module__}:{main.__qualname__}"}
