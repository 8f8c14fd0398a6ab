"""What can be known to be wrong before anything heavy is loaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from alignprop.config.errors import suggestion, unknown
from alignprop.config.settings import ESTIMATORS, Config

TWO_CALL_SCHEDULERS = (
    "DPMSolverSDEScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
)
"""Second-order schedulers, which run up to 2T - 1 denoising steps for ``num_inference_steps`` T."""

WEIGHT_FILES = (".safetensors", ".ckpt")
_OWN_ARGUMENTS = ("prompt", "generator", "output_type", "return_dict", "num_images_per_prompt", "callback_on_step_end")


def check(config: Config) -> list[str]:
    """One sentence for everything in the configuration that names what does not exist, or contradicts itself."""
    checks = (
        _model,
        _scheduler,
        _sampling,
        _truncation,
        _estimator,
        _regularisation,
        _combination,
        _rewards,
        _gradient,
        _wrappers,
        _prompts,
        _per_prompt,
        _evaluation,
        _trackers,
    )
    return [problem for find in checks for problem in find(config)]


def _model(config: Config) -> Iterator[str]:
    name, path = config.model.name, Path(config.model.name).expanduser()
    if name == "emoji" or path.exists():
        return
    if path.suffix in WEIGHT_FILES or name.startswith((".", "/", "~")) or name.count("/") > 1:
        yield f"model.name={name!r} does not exist: give a folder or a .safetensors file that does."
    elif "/" not in name:
        yield unknown("model.name", name, ["emoji"], "give 'emoji', a folder, a .safetensors file, or owner/name.")


def _scheduler(config: Config) -> Iterator[str]:
    if config.model.scheduler is None:
        return
    import diffusers  # takes a second or more, so only where there is a name to look up

    known = [name for name in dir(diffusers) if name.endswith("Scheduler")]
    if config.model.scheduler not in known:
        yield unknown("model.scheduler", config.model.scheduler, known, "give the name of a class of diffusers.")


def _sampling(config: Config) -> Iterator[str]:
    for name in config.sampling.extra:
        if name in _OWN_ARGUMENTS:
            yield f"sampling.extra.{name} is set by the library; leave it out."
        elif name in type(config.sampling).model_fields:
            yield f"sampling.extra.{name} has a setting of its own: sampling.{name}."


def _truncation(config: Config) -> Iterator[str]:
    if config.estimator.name != "alignprop":  # which alone takes it
        return
    settings, num_steps = config.estimator.truncation, config.sampling.num_inference_steps
    values = {name: value for name, value in settings.model_dump(exclude={"kind", "std"}).items() if value is not None}
    if "high" in values and values["low"] > values["high"]:
        yield f"estimator.truncation.low={values['low']} needs at most estimator.truncation.high={values['high']}."
    if num_steps is None or config.model.scheduler in TWO_CALL_SCHEDULERS:
        return
    for name, value in values.items():
        if value > num_steps:
            yield (
                f"estimator.truncation.{name}={value} needs 1 <= {name} <= {num_steps}, the number of denoising "
                f"steps (sampling.num_inference_steps)."
            )


def _estimator(config: Config) -> Iterator[str]:
    settings = config.estimator
    if settings.name not in ESTIMATORS:
        yield unknown("estimator.name", settings.name, ESTIMATORS, f"choose one of {', '.join(ESTIMATORS)}.")
        return
    if settings.name != "alignprop" or settings.arguments:  # importing it takes seconds
        yield from _estimator_arguments(config)
    if settings.memory_gb is not None and settings.checkpointing != "auto":
        yield f"estimator.memory_gb={settings.memory_gb:g} needs estimator.checkpointing=auto, which keeps to it."


def _estimator_arguments(config: Config) -> Iterator[str]:
    from alignprop.config.estimators import estimator_class, load_estimator

    settings = config.estimator
    try:
        load_estimator(settings)
    except ValueError as error:
        yield str(error)
        return
    minibatches, accumulation = settings.arguments.get("minibatches", 1), config.training.accumulation
    if accumulation % minibatches:
        yield (
            f"estimator.arguments.minibatches={minibatches} needs to divide training.accumulation={accumulation}, the "
            "micro-batches that it shares out."
        )
    learns_stepwise = not estimator_class(settings.name).needs_gradient
    if config.adapter.text_encoders and (learns_stepwise or settings.arguments.get("images")):
        yield (
            f"adapter.text_encoders=true needs an estimator that backpropagates the whole picture at once; "
            f"{settings.name} goes step by step: leave it out."
        )
    if settings.checkpointing == "auto" and learns_stepwise:
        yield (
            f"estimator.checkpointing=auto is for estimators that backpropagate the reward; {settings.name} goes step "
            "by step, and its memory does not grow with their number: use none or block."
        )


def _regularisation(config: Config) -> Iterator[str]:
    settings, name = config.regularisation, config.estimator.name
    if name not in ESTIMATORS or settings == type(settings)():  # what there is to check takes seconds to import
        return
    from alignprop.config.estimators import estimator_class
    from alignprop.regularisation import Regularisation

    regularisation = Regularisation(**settings.model_dump())
    yield from regularisation.refusals(name, estimator_class(name).regularisers, full=config.adapter.kind == "full")


def _combination(config: Config) -> Iterator[str]:
    name = config.estimator.name
    if config.combination == "sum" or name not in ESTIMATORS:  # what there is to check takes seconds to import
        return
    from alignprop import surgery
    from alignprop.config.estimators import estimator_class

    yield from surgery.refusals(config.combination, list(config.rewards), name, estimator_class(name).needs_gradient)


def _rewards(config: Config) -> Iterator[str]:
    from alignprop.rewards import REWARDS

    if not config.rewards:
        yield "rewards needs at least one, as in --set rewards.brightness=1; `alignprop rewards` lists them."
    for section, terms in (("rewards", config.rewards), ("judges", config.judges)):
        for name, term in terms.items():
            setting, value = (f"{section}.{name}.target", term.target) if term.target else (section, name)
            if value not in REWARDS and ":" not in value:
                yield unknown(setting, value, REWARDS, "see `alignprop rewards`, or give your own as module:attribute.")


def _gradient(config: Config) -> Iterator[str]:
    """Rewards to train on, of those that have a name, by an estimator that would backpropagate them."""
    from alignprop.rewards import REWARDS

    chosen = {f"rewards.{name}": term.target or name for name, term in config.rewards.items()}
    for name, term in config.rewards.items():
        for source, choice in (_choices(config) or ()) if term.per_prompt else ():
            chosen[f"{_in_settings(choice.place, source)}: the reward"], _ = choice.resolve(term.target or name, {})
    blind = [setting for setting, reward in chosen.items() if reward in REWARDS and not REWARDS[reward].differentiable]
    yield from refusals(config.estimator.name, blind)


def refusals(estimator: str, blind: Sequence[str]) -> list[str]:
    """One sentence for each reward without gradient, if the estimator needs one.

    Args:
        estimator: a row of :data:`ESTIMATORS`; unknown ones are told elsewhere.
        blind: settings of rewards without gradient.
    """
    from alignprop.prompts import import_target

    if not blind or estimator not in ESTIMATORS:
        return []
    from alignprop.estimators.base import no_gradient  # takes seconds, so only where there is something to refuse

    free = [name for name, row in ESTIMATORS.items() if not import_target(row, "estimator.name").needs_gradient]
    if estimator in free:
        return []
    return [f"{setting} {no_gradient(f'estimator.name={estimator}', free)}" for setting in blind]


def _wrappers(config: Config) -> Iterator[str]:
    for name, term in config.rewards.items():
        if term.clamp_above is not None and term.weight < 0:
            yield (
                f"rewards.{name}.clamp_above={term.clamp_above:g} needs a weight above 0, and it is {term.weight:g}: "
                "what is pushed down reaches no target above; leave it out."
            )
        if term.augment is not None and not (term.augment.shift or term.augment.crop or term.augment.noise):
            yield f"rewards.{name}.augment has shift=0, crop=0 and noise=0, which change nothing; raise one of them."


def _prompts(config: Config) -> Iterator[str]:
    from alignprop.prompts import load_prompts

    if config.prompts.train is None:
        yield "prompts.train needs a value: the name of a list, a file, module:function, or a list of prompts."
    for name, source in _sources(config):
        try:
            load_prompts(source)
        except ValueError as error:
            yield _in_settings(error, name)


def _sources(config: Config) -> Iterator[tuple[str, Any]]:
    """The prompts that can be looked at: lists of the package are sound, a module of the user's is imported later."""
    from alignprop.prompts import PROMPT_LISTS

    for name, source in config.prompts:
        if source is not None and source not in PROMPT_LISTS and not _is_function(source):
            yield name, source


def _is_function(source: Any) -> bool:
    return isinstance(source, str) and ":" in source and not source.endswith((".txt", ".jsonl"))


def _in_settings(message: object, name: str) -> str:
    return str(message).replace("prompts=", f"prompts.{name}=", 1)


def _per_prompt(config: Config) -> Iterator[str]:
    """Rewards that lines of prompt files choose, and the one reward of the run that they choose for."""
    terms = {
        f"{section}.{name}": (term.target or name, term.arguments)
        for section, members in (("judges", config.judges), ("rewards", config.rewards))
        for name, term in members.items()
        if term.per_prompt
    }
    if len(terms) > 1:
        yield f"{' and '.join(terms)} both have per_prompt=true; keep it for one, for which the lines choose."
        return
    choices = _choices(config)
    if choices is None:  # told by another check
        return
    if choices and not terms:
        yield (
            f"{_in_settings(choices[0][1].place, choices[0][0])}: a reward or its arguments are chosen, and no reward "
            "of the run has per_prompt=true; set it, or call the fields otherwise."
        )
    for setting, (own, arguments) in terms.items():
        if not choices:
            yield f"{setting}.per_prompt=true needs a JSONL prompt file with a field `reward` or `arguments`."
        for name, choice in choices:
            if problem := _unusable(*choice.resolve(own, arguments)):
                yield f"{_in_settings(choice.place, name)}: {problem}"


def _choices(config: Config) -> list[tuple[str, Any]] | None:
    """What the lines of prompt files choose, each with the setting that names its file; None if one is not usable."""
    from alignprop.prompts import load_prompts

    choices: list[tuple[str, Any]] = []
    for name, source in _sources(config):
        try:
            choices += [(name, choice) for choice in load_prompts(source).choices.values()]
        except ValueError:
            return None
    return choices


def _unusable(reward: str, arguments: Mapping[str, Any]) -> str | None:
    """What is wrong with a reward's name or its arguments; a module of the user's is not imported yet."""
    from alignprop.rewards import REWARDS, arguments_of

    if reward not in REWARDS:
        remedy = "see `alignprop rewards`, or give your own as module:attribute."
        return None if ":" in reward else unknown("reward", reward, REWARDS, remedy)
    known = arguments_of(reward)
    for argument in arguments:
        if argument not in known:
            remedy = f"its arguments are {', '.join(known)}." if known else "leave it out."
            return f"reward={reward} takes no argument {argument!r}; {suggestion(argument, known) or remedy}"
    missing = [name for name in known if known[name].default is known[name].empty and name not in arguments]
    return f"reward={reward} needs {', '.join(missing)}; give them as arguments." if missing else None


def _evaluation(config: Config) -> Iterator[str]:
    settings = config.evaluation
    if (
        settings
        and not settings.num_train_prompts
        and config.prompts.unseen is None
        and config.prompts.train != "animals"
    ):
        yield "evaluation.num_train_prompts=0 leaves nothing to evaluate: raise it, or give prompts.unseen."


def _trackers(config: Config) -> Iterator[str]:
    for name in config.tracking.trackers:
        if find_spec(name) is None:
            yield f"tracking.trackers={name} needs the package {name}: pip install 'alignprop[{name}]'."
