"""What can be known to be wrong before anything heavy is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from alignprop.config.errors import unknown
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
    checks = (_model, _scheduler, _sampling, _truncation, _estimator, _rewards, _prompts, _evaluation, _trackers)
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
    if settings.memory_gb is not None and settings.checkpointing != "auto":
        yield f"estimator.memory_gb={settings.memory_gb:g} needs estimator.checkpointing=auto, which keeps to it."


def _rewards(config: Config) -> Iterator[str]:
    from alignprop.rewards import REWARDS

    if not config.rewards:
        yield "rewards needs at least one, as in --set rewards.brightness=1; `alignprop rewards` lists them."
    for section, terms in (("rewards", config.rewards), ("judges", config.judges)):
        for name, term in terms.items():
            setting, value = (f"{section}.{name}.target", term.target) if term.target else (section, name)
            if value not in REWARDS and ":" not in value:
                yield unknown(setting, value, REWARDS, "see `alignprop rewards`, or give your own as module:attribute.")


def _prompts(config: Config) -> Iterator[str]:
    from alignprop.prompts import PROMPT_LISTS, load_prompts

    if config.prompts.train is None:
        yield "prompts.train needs a value: the name of a list, a file, module:function, or a list of prompts."
    for name, source in config.prompts:
        # Lists of the package are sound, and a module of the user's is imported once everything else is known to be.
        if source is None or source in PROMPT_LISTS or _is_function(source):
            continue
        try:
            load_prompts(source)
        except ValueError as error:
            yield str(error).replace("prompts=", f"prompts.{name}=", 1)


def _is_function(source: Any) -> bool:
    return isinstance(source, str) and ":" in source and not source.endswith((".txt", ".jsonl"))


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
