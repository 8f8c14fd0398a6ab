"""All that is wrong with a configuration, told at once, in the words of its settings."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, get_args, get_origin

from pydantic import ValidationError

from alignprop.config.settings import Config, Section

_NEEDS = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "text",
    "dict_type": "a mapping of settings",
    "model_type": "a mapping of settings",
    "tuple_type": "a list",
    "missing": "a value",
    "greater_than": "more than {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
    "too_short": "at least {min_length} entries",
    "too_long": "at most {max_length} entries",
    "literal_error": "one of {expected}",
    "union_tag_invalid": "one of {expected_tags}",
    "union_tag_not_found": "a kind, as in kind=uniform",
    "value_error": "{error}",
}
"""What a setting needs, by pydantic's type of error."""


class ConfigError(ValueError):
    """A configuration cannot be used.

    Attributes:
        problems: one sentence each, with the setting, its value and the remedy.
    """

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        super().__init__("\n".join(self.problems))


def explain(error: ValidationError, data: Mapping[str, Any]) -> list[str]:
    """One sentence for each setting that pydantic refuses.

    Args:
        error: what it raised.
        data: what it was given.
    """
    return list(dict.fromkeys(_sentence(detail, data) for detail in error.errors()))


def _sentence(detail: Any, data: Mapping[str, Any]) -> str:
    path, kind = _path(detail["loc"], data), detail["type"]
    if kind == "extra_forbidden":
        return _unknown_key(path, detail["loc"])
    context = detail.get("ctx", {})
    need = _NEEDS.get(kind, detail["msg"][:1].lower() + detail["msg"][1:]).format(**context)
    if kind == "missing":
        return f"{path} needs {need}."
    value = detail["input"]
    if kind == "union_tag_invalid":
        path, value = f"{path}.kind", context["tag"]
    choices = context.get("expected_tags") or context.get("expected") or ""
    hint = suggestion(str(value), choices.replace("'", "").replace(" or ", ", ").split(", "))
    return f"{path}={shown(value)} needs {need}{f'; {hint}' if hint else '.'}"


def _path(location: Sequence[int | str], data: Any) -> str:
    """The dotted name of a setting; what pydantic adds for the members of unions is left out."""
    parts = []
    for place, part in enumerate(location):
        last = place == len(location) - 1
        if isinstance(data, Mapping) and (part in data or last):
            parts.append(str(part))
            data = data.get(part)
        elif isinstance(data, (list, tuple)) and isinstance(part, int):
            parts[-1] += f"[{part}]"
            data = data[part] if part < len(data) else None
    return ".".join(parts)


def _unknown_key(path: str, location: Sequence[int | str]) -> str:
    names = list(setting_names())
    if path in names:  # it exists, for another kind
        return f"{path} does not go with kind={location[-2]}; leave it out or choose another kind."
    own = path.rpartition(".")[2]
    near = difflib.get_close_matches(path, names, n=1, cutoff=0.75)
    near = near or [name for name in names if name.rpartition(".")[2] == own]
    near = near or difflib.get_close_matches(path, names, n=1)
    return f"{path} is no setting; " + (
        f"did you mean {' or '.join(near)}?" if near else "see `alignprop recipes emoji`."
    )


def setting_names(section: type[Section] = Config, prefix: str = "") -> Iterator[str]:
    """The dotted names of all settings; ``<name>`` stands for a key of the user's choice."""
    for name, field in section.model_fields.items():
        yield prefix + name
        inside = f"{prefix}{name}.<name>." if get_origin(field.annotation) is dict else f"{prefix}{name}."
        for inner in _sections_in(field.annotation):
            yield from setting_names(inner, inside)


def _sections_in(annotation: Any) -> Iterator[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    for argument in get_args(annotation):
        yield from _sections_in(argument)


def suggestion(value: str, known: Iterable[str]) -> str:
    """``did you mean ...?``, or nothing."""
    near = difflib.get_close_matches(value, list(known), n=1)
    return f"did you mean {near[0]!r}?" if near else ""


def unknown(setting: str, value: str, known: Iterable[str], otherwise: str) -> str:
    """The sentence for a name that does not exist.

    Args:
        setting: its dotted name.
        value: what was given.
        known: names that exist.
        otherwise: the remedy, where no name is near.
    """
    return f"{setting}={shown(value)} is unknown; {suggestion(value, known) or otherwise}"


def shown(value: Any) -> str:
    """A value as a message shows it, cut where it is long."""
    text = value if isinstance(value, str) and value.isidentifier() else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
