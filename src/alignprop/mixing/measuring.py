"""What a sweep measures: the rewards of all members' runs, on prompts of the first one's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from alignprop.config import Config, ConfigError, JudgeTerm

if TYPE_CHECKING:
    from alignprop.prompts import Prompts


def merged_terms(configs: Mapping[str, Config | None], asked: Sequence[str]) -> dict[str, JudgeTerm]:
    """Every reward that is trained or watched in a run, and those that are asked for beside them.

    Args:
        configs: of the runs, by the member's name; None where they are not known.
        asked: names of further rewards.

    Returns:
        Terms by name, those that are trained first; where two runs mean different things by one name, the later
        member's name is put behind it.
    """
    terms: dict[str, JudgeTerm] = {}
    for kind in ("rewards", "judges"):
        for member, config in configs.items():
            found: Mapping[str, JudgeTerm] = getattr(config, kind) if config is not None else {}
            for name, term in found.items():
                measured = _measured(term)
                if terms.setdefault(name, measured) != measured:
                    own = measured.model_copy(update={"target": term.target or name})
                    terms.setdefault(f"{name} of {member}", own)
    return {**terms, **{name: JudgeTerm() for name in asked if name not in terms}}


def _measured(term: JudgeTerm) -> JudgeTerm:
    """A term without what concerns its training."""
    return JudgeTerm(target=term.target, arguments=term.arguments, frames=term.frames, per_prompt=term.per_prompt)


def trained_by(configs: Mapping[str, Config | None]) -> dict[str, list[str]]:
    """The names of the rewards that each member was trained on."""
    return {member: list(config.rewards) if config is not None else [] for member, config in configs.items()}


def chosen_prompts(config: Config | None, source: str | None) -> tuple[Prompts, tuple[str, ...]]:
    """All prompts of a source or a run, and the unseen ones of them; the training ones where there are no others.

    Raises:
        ConfigError: there is neither.
    """
    from alignprop.prompts import load_prompts

    if source is not None:
        prompts = load_prompts(source)
    elif config is not None and config.prompts.train is not None:
        prompts = load_prompts(config.prompts.train, config.prompts.unseen)
    else:
        raise ConfigError(["--prompts is missing: give the name of a list, a file, or module:function."])
    return prompts, prompts.unseen or prompts.train


def mixture_settings(configs: Mapping[str, Config | None]) -> dict[str, Any] | None:
    """The first member's settings, for a mixture's header: with the others' rewards as judges, to be evaluated on."""
    first = next(iter(configs.values()))
    if first is None:
        return None
    others = {name: term for name, term in merged_terms(configs, ()).items() if name not in first.rewards}
    known = {name: first.judges.get(name, term) for name, term in others.items()}
    return first.model_copy(update={"judges": known}).model_dump(mode="json")
