"""Configurations from recipes, files and overrides; to files."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from alignprop.config.checks import check
from alignprop.config.errors import ConfigError, explain, suggestion
from alignprop.config.settings import Config
from alignprop.runfolder import write_atomically

RECIPES = Path(__file__).parent.parent / "recipes"
"""The recipes of the package."""


class _Loader(yaml.SafeLoader):
    """YAML 1.2's numbers: in YAML 1.1, which PyYAML reads, 1e-3 is a text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


@dataclass(frozen=True)
class Recipe:
    """A configuration of the package.

    Attributes:
        path: of its file.
        description: one line.
    """

    path: Path
    description: str


def recipes() -> dict[str, Recipe]:
    """The recipes of the package by name."""
    paths = sorted(RECIPES.glob("*.yaml"))
    return {path.stem: Recipe(path, _read(path).get("description", "")) for path in paths}


def load_config(recipe: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a recipe or a file, apply overrides, and check everything that can be checked without loading a model.

    Args:
        recipe: the name of a recipe of the package, or the path of a YAML file.
        overrides: ``section.key=value``, the value in YAML.

    Raises:
        ConfigError: with all that is wrong.
    """
    data = _read(recipe_path(recipe))
    problems = [problem for override in _kinds_first(overrides) for problem in _apply(data, override)]
    try:
        config = Config.model_validate(data)
    except ValidationError as error:
        problems += explain(error, data)
        broken = {detail["loc"][0] for detail in error.errors()}
        # Sections that are sound are checked too, so that all errors are told at once.
        config = Config.model_validate({name: value for name, value in data.items() if name not in broken})
        problems += [problem for problem in check(config) if re.split(r"[.=\s]", problem)[0] not in broken]
    else:
        problems += check(config)
    if problems:
        raise ConfigError(problems)
    return config


def read_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """Settings that stand alone, such as the arguments of a reward.

    Args:
        overrides: ``key=value``, the value in YAML.

    Raises:
        ConfigError: with all that is wrong.
    """
    data: dict[str, Any] = {}
    problems = [problem for override in overrides for problem in _apply(data, override)]
    if problems:
        raise ConfigError(problems)
    return data


def recipe_path(recipe: str | Path) -> Path:
    """The file of a recipe or configuration.

    Raises:
        ConfigError: there is none.
    """
    names = [path.stem for path in RECIPES.glob("*.yaml")]
    if str(recipe) in names:
        return RECIPES / f"{recipe}.yaml"
    if not Path(recipe).is_file():
        remedy = suggestion(str(recipe), names) or "see `alignprop recipes`, or give the path of a .yaml file."
        raise ConfigError([f"recipe={str(recipe)!r} is no recipe and no file; {remedy}"])
    return Path(recipe)


def read_config(path: Path) -> Config:
    """Read a configuration that was used, without checking that what it names is still there.

    Raises:
        ConfigError: it cannot be read.
    """
    data = _read(path)
    try:
        return Config.model_validate(data)
    except ValidationError as error:
        raise ConfigError(explain(error, data)) from error


def save(config: Config, path: Path) -> None:
    """Write a configuration whole, with every default."""
    write_atomically(path, yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True))


def _read(path: Path) -> dict[str, Any]:
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), _Loader)  # a SafeLoader
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError([f"{path} cannot be read: {error}"]) from error
    if not isinstance(data, dict):
        raise ConfigError([f"{path} needs sections with settings, as `alignprop recipes emoji` shows."])
    return data


def _kinds_first(overrides: Sequence[str]) -> list[str]:
    return sorted(overrides, key=lambda override: not override.partition("=")[0].endswith(".kind"))


def _apply(data: dict[str, Any], override: str) -> list[str]:
    """Set one value; returns what is wrong with the override itself."""
    name, equals, text = override.partition("=")
    if not equals or not name.strip():
        return [f"--set {override} needs the form section.key=value."]
    try:
        value = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        return [f"--set {override}: the value is no YAML ({str(error).splitlines()[0]})."]
    *parents, key = _split(name.strip())
    target = data
    for parent in parents:
        if not isinstance(target.get(parent), Mapping):
            target[parent] = _opened(parents[0], target.get(parent))
        target = target[parent]
    if key == "kind" and target.get("kind") != value:
        target.clear()  # the other keys belong to the kind before
    target[key] = value
    return []


def _split(name: str) -> list[str]:
    """The parts of a dotted name; the dots of ``module.submodule:attribute`` are its own."""
    section, dot, rest = name.partition(".")
    return [section, *re.findall(r"[\w.]+:\w+|[^.]+", rest)] if dot else [section]


def _opened(section: str, value: Any) -> dict[str, Any]:
    """A mapping in the place of a reward's short form: a weight, a name or a list of names."""
    if section not in ("rewards", "judges") or value is None:
        return {}
    if isinstance(value, (list, tuple)):
        return {str(name): {} for name in value}
    return {value: {}} if isinstance(value, str) else {"weight": value}
