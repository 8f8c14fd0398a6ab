"""From a configuration to the objects that train: the one place that knows both."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignprop.config.checks import refusals
from alignprop.config.errors import ConfigError, suggestion
from alignprop.config.estimators import load_estimator
from alignprop.config.settings import (
    Config,
    JudgeTerm,
    Model,
    RewardTerm,
    Sampling,
)

if TYPE_CHECKING:
    import torch

    from alignprop.guard import Guard
    from alignprop.probe import Finding
    from alignprop.prompts import Prompts
    from alignprop.rewards import Reward, WeightedSum
    from alignprop.seams import Checkpointing
    from alignprop.trainer import Callback, Trainer


def build(config: Config, folder: Path, *, callbacks: Sequence[Callback] = ()) -> Trainer:
    """Load everything that the configuration names, and put it together.

    Args:
        config: the settings of the run.
        folder: of the run; nothing is written before the training starts.
        callbacks: called after those of the configuration.

    Raises:
        ConfigError: a setting does not fit the pipeline.
        ValueError: a reward, a prompt source or the model cannot be loaded.
    """
    import torch

    from alignprop.adapters import Full, Lora
    from alignprop.optimisation import Optimizer
    from alignprop.prompts import load_prompts
    from alignprop.regularisation import Regularisation
    from alignprop.trainer import Trainer

    if config.training.num_threads is not None:
        torch.set_num_threads(config.training.num_threads)
    assert config.prompts.train is not None, "checked when the configuration was loaded"
    prompts = load_prompts(config.prompts.train, config.prompts.unseen)
    device = device_of(config.model)
    reward = load_objective(config.rewards, device, prompts)
    _require_gradient(config, reward)
    watched = {name: term for name, term in config.judges.items() if name not in config.rewards}
    judges = load_terms(watched, device, prompts)
    pipeline = load_pipeline(config.model)
    check_call(pipeline, config.sampling)
    trainer = Trainer(
        pipeline=pipeline,
        reward=reward,
        prompts=prompts.train,
        call=config.sampling.call(),
        lora=Full() if config.adapter.kind == "full" else Lora(**config.adapter.model_dump(exclude={"kind"})),
        optimizer=Optimizer(**config.optimizer.model_dump()),
        estimator=load_estimator(config.estimator),
        regularisation=Regularisation(**config.regularisation.model_dump()),
        combination=config.combination,
        callbacks=[*_callbacks(config, folder, prompts, judges), *callbacks],
        **config.training.model_dump(exclude={"num_threads"}),
    )
    if config.estimator.checkpointing == "auto":
        trainer.estimator = replace(trainer.estimator, checkpointing=_memory_plan(trainer, config))  # type: ignore[type-var]
    return trainer


def load_pipeline(model: Model) -> Any:
    """Load a pipeline and its scheduler, onto its device.

    Raises:
        ValueError: there is no such model here, and it cannot be had from the hub.
    """
    import torch

    from alignprop import emoji

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[model.dtype]
    pipeline = emoji.pipeline(dtype) if model.name == "emoji" else _from_elsewhere(model, dtype)
    if model.dtype == "fp16":
        from alignprop.spec import spec_of

        if (decoder := spec_of(pipeline).decoder_of(pipeline)) is not None:
            decoder.to(torch.float32)
    _set_scheduler(pipeline, model)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device_of(model))


def _from_elsewhere(model: Model, dtype: Any) -> Any:
    import diffusers

    path = Path(model.name).expanduser()
    default = "StableDiffusionPipeline" if path.is_file() else "DiffusionPipeline"
    cls = getattr(diffusers, model.pipeline or default, None)
    if cls is None:
        raise ConfigError([f"model.pipeline={model.pipeline} is no class of diffusers; check the spelling."])
    if path.is_file() and not hasattr(cls, "from_single_file"):
        raise ConfigError([f"model.pipeline={model.pipeline} reads no single file: give the folder of a pipeline."])
    try:
        if path.is_file():
            config = {} if model.config is None else {"config": str(Path(model.config).expanduser())}
            return cls.from_single_file(str(path), torch_dtype=dtype, **config)
        name = str(path) if path.exists() else model.name
        return cls.from_pretrained(name, torch_dtype=dtype, revision=model.revision, variant=model.variant)
    except (
        OSError,
        ValueError,
        RuntimeError,
    ) as error:  # what hub and diffusers raise for absent, foreign or cut files
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError([_not_loaded(model, path, reason)]) from error


def _not_loaded(model: Model, path: Path, reason: str) -> str:
    if path.is_file():
        return (
            f"model.name={model.name!r} cannot be loaded as {model.pipeline or 'StableDiffusionPipeline'} ({reason}): "
            "set model.pipeline to the class of the file's pipeline and, without network, model.config to a folder of "
            "that family with its model_index.json."
        )
    if path.exists():
        return (
            f"model.name={model.name!r} cannot be loaded as {model.pipeline or 'a diffusers pipeline'} ({reason}): "
            "give a folder with a model_index.json, or set model.pipeline to the class of the file's pipeline."
        )
    return (
        f"model.name={model.name!r} is no folder or file here, and cannot be had from the hub ({reason}). "
        "Without network, download it elsewhere (`hf download`) and give the folder: --set model.name=/path/to/model."
    )


def _set_scheduler(pipeline: Any, model: Model) -> None:
    """Replace the pipeline's scheduler as the settings say."""
    if model.scheduler is None and not model.scheduler_arguments:
        return
    import diffusers

    own = type(pipeline.scheduler)
    cls = getattr(diffusers, model.scheduler) if model.scheduler else own
    if ("FlowMatch" in cls.__name__) != ("FlowMatch" in own.__name__):
        problem = f"model.scheduler={cls.__name__} does not go with a model made for {own.__name__}"
        raise ConfigError([f"{problem}: choose one of its kind."])
    pipeline.scheduler = cls.from_config(pipeline.scheduler.config, **model.scheduler_arguments)


def check_call(pipeline: Any, sampling: Sampling) -> None:
    """Refuse arguments that the pipeline's call does not take.

    Raises:
        ConfigError: with all of them.
    """
    known = inspect.signature(pipeline.__call__).parameters
    problems = [
        f"sampling.{'extra.' if name in sampling.extra else ''}{name} is no argument of {type(pipeline).__name__}; "
        + (suggestion(name, known) or "leave it out.")
        for name in sampling.call()
        if name not in known
    ]
    if problems:
        raise ConfigError(problems)


def _require_gradient(config: Config, reward: WeightedSum) -> None:
    """Refuse rewards of the user's that say they have no gradient; those with a name have been refused already."""
    from alignprop.rewards import is_differentiable

    blind = [f"rewards.{name}" for name, part in reward.rewards.items() if not is_differentiable(part)]
    if problems := refusals(config.estimator.name, blind):
        raise ConfigError(problems)


def load_objective(
    terms: Mapping[str, RewardTerm], device: torch.device | str, prompts: Prompts | None = None
) -> WeightedSum:
    """Load the rewards that are trained, with all that their settings put around them; see :func:`load_terms`."""
    return shaped(terms, load_terms(terms, device, prompts))


def shaped(terms: Mapping[str, RewardTerm], rewards: Mapping[str, Reward]) -> WeightedSum:
    """The sum of loaded rewards, with all that their settings put around them."""
    from alignprop.rewards import WeightedSum

    wrapped = {name: _wrapped(name, term, rewards[name]) for name, term in terms.items()}
    return WeightedSum(wrapped, {name: term.weight for name, term in terms.items()})


def load_terms(
    terms: Mapping[str, JudgeTerm], device: torch.device | str, prompts: Prompts | None = None
) -> dict[str, Reward]:
    """Load rewards as they are measured, and move those that are models to the pipeline's device.

    Args:
        terms: by name.
        device: of the pipeline.
        prompts: whose lines choose the reward of a term that is ``per_prompt``; None for none that do.
    """
    from torch import nn

    rewards = {name: _load_term(name, term, prompts) for name, term in terms.items()}
    return {name: reward.to(device) if isinstance(reward, nn.Module) else reward for name, reward in rewards.items()}


def _load_term(name: str, term: JudgeTerm, prompts: Prompts | None) -> Reward:
    from alignprop.rewards import OnFrames, load_per_prompt, load_reward, modality_of

    reward: Reward
    if term.per_prompt and prompts is not None:
        everything = (*prompts.train, *prompts.unseen)
        reward = load_per_prompt(term.target or name, term.arguments, everything, prompts.choices)
    else:
        reward = load_reward(term.target or name, **term.arguments)
    if term.frames is None:
        return reward
    if modality_of(reward) != "image":
        raise ConfigError([f"rewards.{name}.frames={term.frames}: the reward takes whole videos; leave it out."])
    return OnFrames(reward, term.frames)


def _wrapped(name: str, term: RewardTerm, reward: Reward) -> Reward:
    """A reward as it is optimised, in the wrappers of its settings."""
    from alignprop.rewards import Augmented, Checkpointed, Clamped, Normalised, modality_of

    if term.augment is not None and modality_of(reward) == "audio":
        raise ConfigError([f"rewards.{name}.augment is of pictures, and the reward takes waveforms; leave it out."])
    if term.checkpoint:
        reward = Checkpointed(reward)
    if term.augment is not None:
        reward = Augmented(reward, **term.augment.model_dump())
    if term.clamp_above is not None:
        reward = Clamped(reward, term.clamp_above)
    return Normalised(reward) if term.normalise else reward


def device_of(model: Model) -> torch.device:
    """Where a model goes: what its setting says, else this process's own device."""
    import torch

    from alignprop import distributed

    return torch.device(model.device) if model.device is not None else distributed.process().device


def _callbacks(config: Config, folder: Path, prompts: Prompts, judges: Mapping[str, Reward]) -> list[Callback]:
    """In an order that matters: a checkpoint must find the evaluation of its step written."""
    from alignprop.checkpointing import Checkpoints
    from alignprop.evaluation import Evaluation
    from alignprop.runfolder import RunFolder
    from alignprop.tracking import MetricsFile, Trackers

    files, settings = RunFolder(folder), config.model_dump(mode="json")
    callbacks: list[Callback] = [MetricsFile(files)]
    if config.evaluation is not None:
        sets = evaluation_sets(prompts, config.evaluation.num_train_prompts)
        own = config.evaluation.model_dump(exclude={"num_train_prompts"})
        callbacks.append(Evaluation(files, sets, judges, guard=guard_of(config), metadata={"config": settings}, **own))
    else:
        callbacks.append(LastAdapter(files.adapter, {"config": settings}))
    callbacks.append(Checkpoints(files, **config.checkpoints.model_dump()))
    if config.tracking.trackers:
        callbacks.append(Trackers(config.tracking.trackers, config.tracking.project, files, settings))
    return callbacks


def guard_of(config: Config) -> Guard:
    """The guard that a configuration asks for; one that never warns if it asks for none."""
    from alignprop.guard import NO_GUARD, Guard

    return NO_GUARD if config.guard is None else Guard(**config.guard.model_dump())


@dataclass(frozen=True)
class LastAdapter:
    """Writes the adapter at the end of a run without evaluation, which has no best one.

    Attributes:
        folder: to write it into.
        metadata: facts for the header of its file.
    """

    folder: Path
    metadata: Mapping[str, Any]

    def start(self, trainer: Trainer) -> None:
        """Nothing to do."""

    def step(self, trainer: Trainer, metrics: Mapping[str, Any]) -> None:
        """Nothing to do."""

    def end(self, trainer: Trainer) -> None:
        """Write the weights that the run ends with."""
        from alignprop import distributed

        if distributed.process().is_main_process:
            with trainer.adapter.weights(trainer.evaluated_weights(), as_reloaded=False):
                trainer.adapter.save(self.folder, {**self.metadata, "step": trainer.step})


def evaluation_sets(prompts: Prompts, num_train: int) -> dict[str, tuple[str, ...]]:
    """The unseen prompts, and ``num_train`` of the training prompts, evenly spaced in their list."""
    total = len(prompts.train)
    num_train = min(num_train, total)
    some = tuple(prompts.train[i * total // num_train] for i in range(num_train))
    return {name: chosen for name, chosen in (("unseen", prompts.unseen), ("train", some)) if chosen}


def _memory_plan(trainer: Trainer, config: Config) -> Any:
    """Measure what a micro-batch holds, on two denoising steps."""
    import torch

    from alignprop.estimators import AlignProp, MicroBatch
    from alignprop.memory import available_bytes, plan_memory
    from alignprop.rollout import Sampler
    from alignprop.truncation import Last

    device = trainer.pipeline.device
    regulariser = trainer.regularise(0.0) if trainer.regularise is not None else None
    sampler = Sampler(trainer.pipeline, {**trainer.call, "num_inference_steps": 2}, regulariser=regulariser)
    prompts, seeds = trainer.batch(0)

    def run(live_steps: int, mode: Any) -> None:
        batch = MicroBatch(0, prompts, seeds, torch.Generator(), trainer.descent())
        AlignProp(Last(live_steps), mode)(sampler, trainer.objective, batch, weight=0.0)
        trainer.adamw.zero_grad()

    gigabytes = config.estimator.memory_gb
    limit = available_bytes(device) if gigabytes is None else int(gigabytes * 1e9)
    return plan_memory(run, max_live_steps=max_live_steps(trainer, config), limit=limit, device=device)


def probe_trainer(trainer: Trainer) -> list[Finding]:
    """What the probe finds of a trainer, on two of its prompts and in the checkpointing modes that it may use."""
    from alignprop.probe import probe

    return probe(
        trainer.sampler,
        trainer.adapter,
        trainer.objective,
        trainer.prompts[:2],
        modes=_probed_modes(trainer),
        differentiable=trainer.estimator.needs_gradient,
        combination=trainer.combination,
    )


def _probed_modes(trainer: Trainer) -> Sequence[Checkpointing]:
    """The checkpointing modes that a run may use, behind a mode to compare them with that needs no more memory."""
    from alignprop.memory import MemoryPlan

    mode: Any = getattr(trainer.estimator, "checkpointing", "none")
    if isinstance(mode, MemoryPlan):
        return tuple(mode.costs)
    if mode == "none":
        return ("none",)
    return ("block" if mode == "nested" else "none", mode)


def max_live_steps(trainer: Trainer, config: Config) -> int:
    """The longest window that the truncation may draw."""
    windowed = config.estimator.name == "alignprop"
    for bound in ("steps", "high") if windowed else ():
        if (longest := getattr(config.estimator.truncation, bound, None)) is not None:
            return int(longest)
    default = inspect.signature(trainer.pipeline.__call__).parameters["num_inference_steps"].default
    return int((config.sampling.num_inference_steps or default) * getattr(trainer.pipeline.scheduler, "order", 1))
