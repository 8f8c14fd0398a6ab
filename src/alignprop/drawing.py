"""What the commands that use an adapter need: its folder, the settings that it was trained with, pictures, measures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

    from alignprop.config import Config, JudgeTerm, Model
    from alignprop.config.settings import EvaluationSettings, Sampling
    from alignprop.rewards import Reward
    from alignprop.rollout import Sampler

DEFAULT_RECIPE = "emoji"
"""What gives the settings where nothing else does."""

BATCH_SIZE = 16
"""Pictures drawn at a time."""


def settings_of(adapter: Path | None) -> Config | None:
    """The settings of the run that an adapter came from: of its folder, else of the adapter's own header.

    None where neither tells, as for an adapter from elsewhere or a header that this version cannot read.
    """
    from alignprop.config import read_config

    if adapter is None:
        return None
    for folder in (adapter, adapter.parent):
        if (folder / "config.yaml").is_file():
            return read_config(folder / "config.yaml")
    return _settings_in_header(adapter)


def _settings_in_header(adapter: Path) -> Config | None:
    from pydantic import ValidationError

    from alignprop.adapter_files import facts_of
    from alignprop.config import Config
    from alignprop.mixing.schedule import holds_schedule, read_schedule

    holder = next(iter(read_schedule(adapter)[1].values())) if holds_schedule(adapter) else adapter
    try:
        return Config.model_validate(facts_of(holder).get("config"))
    except ValidationError:
        return None


def adapter_folder(adapter: Path) -> Path:
    """The folder with the adapter's file, given it or its run.

    Raises:
        ValueError: there is none.
    """
    from alignprop.adapter_files import DIFFUSERS_FILE, holds_adapter
    from alignprop.mixing.schedule import holds_schedule

    for folder in (adapter, adapter / "adapter"):
        if holds_adapter(folder) or holds_schedule(folder):
            return folder
    raise ValueError(f"adapter={str(adapter)!r} holds no {DIFFUSERS_FILE}: give an adapter's folder or a run's.")


def base_sampler(
    model: str | None, adapter: Path | None, steps: int | None, guidance: float | None
) -> tuple[Sampler, Path | None]:
    """The base model with the settings that go with it, and the folder of the adapter that is asked for."""
    from alignprop.config import check_call, load_pipeline
    from alignprop.rollout import Sampler

    folder = adapter_folder(adapter) if adapter is not None else None
    chosen, sampling = base_settings(model, adapter, steps, guidance)
    pipeline = load_pipeline(chosen)
    check_call(pipeline, sampling)
    return Sampler(pipeline, sampling.call()), folder


def base_settings(
    model: str | None, adapter: Path | None, steps: int | None, guidance: float | None
) -> tuple[Model, Sampling]:
    """Which model :func:`base_sampler` loads, and the arguments of its call."""
    from alignprop.config import Config, Model, read_config, recipe_path

    config = settings_of(adapter)
    if config is None:
        config = Config() if model not in (None, "emoji") else read_config(recipe_path(DEFAULT_RECIPE))
    changes = {"num_inference_steps": steps, "guidance_scale": guidance}
    sampling = config.sampling.model_copy(update={name: value for name, value in changes.items() if value is not None})
    return config.model if model in (None, config.model.name) else Model(name=model), sampling


def adapted(sampler: Sampler, folder: Path) -> Sampler:
    """A sampler with an adapter, or a mixture of some, loaded into its pipeline."""
    from alignprop.mixing import load_mixture
    from alignprop.rollout import Sampler

    return Sampler(sampler.pipeline, {**sampler.call, **load_mixture(sampler.pipeline, folder)}, sampler.spec)


def pictures(sampler: Sampler, prompt: str, num: int, seed: int) -> list[Image]:
    """Draw one prompt at consecutive seeds."""
    from alignprop.pixels import to_pil

    drawn: list[Image] = []
    for first in range(0, num, BATCH_SIZE):
        seeds = range(seed + first, seed + min(first + BATCH_SIZE, num))
        drawn += to_pil(sampler.sample([prompt] * len(seeds), seeds))
    return drawn


def write_pictures(columns: Sequence[tuple[str, list[Image]]], out: Path) -> None:
    """Write a single picture as it is, and several, by their captions, as a grid."""
    from alignprop.pictures import save_grid

    out.parent.mkdir(parents=True, exist_ok=True)
    if len(columns) == len(columns[0][1]) == 1:
        columns[0][1][0].save(out)
    else:
        save_grid([pictures for _, pictures in columns], [caption for caption, _ in columns], out)


def how_to_measure(config: Config | None, images_per_prompt: int | None, seed: int | None) -> dict[str, Any]:
    """Arguments of :func:`alignprop.measures.evaluate`: as asked for, else those that gave the run's own numbers."""
    asked = {"images_per_prompt": images_per_prompt, "seed": seed}
    found = _evaluation_of(config).model_dump(include={"images_per_prompt", "batch_size", "seed"})
    return {**found, **{name: value for name, value in asked.items() if value is not None}}


def _evaluation_of(config: Config | None) -> EvaluationSettings:
    """How a run evaluates; as runs do by default where it does not, or where there is none."""
    from alignprop.config.settings import EvaluationSettings

    return (config.evaluation if config is not None else None) or EvaluationSettings()


def measures(
    config: Config | None, names: Sequence[str], source: str | None, device: torch.device
) -> tuple[dict[str, Reward], dict[str, tuple[str, ...]]]:
    """What to measure on which prompts: as asked for, else as in the run."""
    from alignprop.config import JudgeTerm, evaluation_sets, load_terms
    from alignprop.prompts import load_prompts

    terms: Mapping[str, JudgeTerm] = {name: JudgeTerm() for name in names}
    if config is not None and not names:
        judges = {name: term for name, term in config.judges.items() if name not in config.rewards}
        terms = {**config.rewards, **judges}  # as in training: the last one that embeds pictures tells their diversity
    if not terms:
        raise ValueError("--reward is missing: give one or more; `alignprop rewards` lists them.")
    if source is not None:
        prompts = load_prompts(source)
        return load_terms(terms, device, prompts), evaluation_sets(prompts, len(prompts.train))
    if config is None or config.prompts.train is None:
        raise ValueError("--prompts is missing: give the name of a list, a file, or module:function.")
    prompts = load_prompts(config.prompts.train, config.prompts.unseen)
    return load_terms(terms, device, prompts), evaluation_sets(prompts, _evaluation_of(config).num_train_prompts)
