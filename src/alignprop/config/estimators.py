"""From the estimator's settings to the estimator: names and values checked before anything heavy is loaded."""

from __future__ import annotations

import dataclasses
import inspect
import sys
import typing
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError

from alignprop.config.errors import suggestion, unknown
from alignprop.config.settings import ESTIMATORS, EstimatorSettings, TruncationSettings

if TYPE_CHECKING:
    from alignprop.truncation import Truncation

SECTION = "estimator.arguments"
_OWN_SETTINGS = ("truncation", "checkpointing")
"""Arguments that have a setting of their own, for all estimators that take them."""


def load_estimator(settings: EstimatorSettings) -> Any:
    """The estimator that the settings describe.

    Raises:
        ValueError: an argument does not exist or does not fit, in one sentence.
    """
    cls = estimator_class(settings.name)
    known = arguments_of(cls)
    arguments = {name: _value(settings.name, known, name, value) for name, value in settings.arguments.items()}
    fields = {field.name for field in dataclasses.fields(cls)}
    if "truncation" in fields:
        arguments["truncation"] = _truncation(settings.truncation)
    if "checkpointing" in fields:  # `auto` is replaced once it is measured
        arguments["checkpointing"] = "none" if settings.checkpointing == "auto" else settings.checkpointing
    try:
        return cls(**arguments)
    except ValueError as error:
        raise ValueError(f"{SECTION}.{error}") from error


def estimator_class(name: str) -> Any:
    """The class of a row of :data:`ESTIMATORS`."""
    from alignprop.prompts import import_target

    return import_target(ESTIMATORS[name], "estimator.name")


def arguments_of(cls: Any) -> dict[str, Any]:
    """Types of what ``estimator.arguments`` may hold for an estimator, by name."""
    types = typing.get_type_hints(cls)
    return {field.name: types[field.name] for field in dataclasses.fields(cls) if field.name not in _OWN_SETTINGS}


@dataclasses.dataclass(frozen=True)
class EstimatorDescription:
    """What there is to say of an estimator.

    Attributes:
        name: a row of :data:`ESTIMATORS`.
        formula: what it computes, and the source, the first line in short.
        explanation: of its settings.
        arguments: defaults of ``estimator.arguments``, by name.
        needs_gradient: whether the reward must be differentiable.
    """

    name: str
    formula: str
    explanation: str
    arguments: dict[str, str]
    needs_gradient: bool


def describe_estimators(name: str | None = None) -> list[EstimatorDescription]:
    """Describe one estimator, or all.

    Raises:
        ValueError: there is none of this name.
    """
    if name is not None and name not in ESTIMATORS:
        raise ValueError(unknown("estimator", name, ESTIMATORS, f"choose one of {', '.join(ESTIMATORS)}."))
    return [_described(each) for each in ([name] if name else ESTIMATORS)]


def _described(name: str) -> EstimatorDescription:
    cls = estimator_class(name)
    known, defaults = arguments_of(cls), {field.name: field.default for field in dataclasses.fields(cls)}
    formula = inspect.cleandoc(sys.modules[cls.__module__].__doc__ or "")
    arguments = {argument: "null" if defaults[argument] is None else str(defaults[argument]) for argument in known}
    return EstimatorDescription(name, formula, inspect.cleandoc(cls.__doc__ or ""), arguments, cls.needs_gradient)


def _value(estimator: str, known: dict[str, Any], name: str, value: Any) -> Any:
    if name in _OWN_SETTINGS:
        raise ValueError(f"{SECTION}.{name} has a setting of its own: estimator.{name}.")
    if name not in known:
        remedy = f"its arguments are {', '.join(known)}." if known else "leave it out."
        raise ValueError(f"{SECTION}.{name} is none of {estimator}'s; {suggestion(name, known) or remedy}")
    try:
        return TypeAdapter(known[name]).validate_python(value, strict=not _is_whole(value))
    except ValidationError as error:
        problem = error.errors()[0]["msg"]
        raise ValueError(f"{SECTION}.{name}={value!r} does not fit: {problem[0].lower()}{problem[1:]}.") from error


def _is_whole(value: Any) -> bool:
    """Whether a value is a whole number, which YAML writes without a point and stands for a float as well."""
    return isinstance(value, int) and not isinstance(value, bool)


def _truncation(settings: TruncationSettings) -> Truncation:
    from alignprop import truncation

    kinds = {
        "all": truncation.All,
        "last": truncation.Last,
        "uniform": truncation.Uniform,
        "gaussian": truncation.Gaussian,
    }
    made: Truncation = kinds[settings.kind](**settings.model_dump(exclude={"kind"}))
    return made
