"""What the commands that use an adapter need: its folder, the settings that it was trained with, pictures, measures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

    from alignprop.config import Config, JudgeTerm
    from alignprop.rewards import Reward
    from alignprop.rollout import Sampler

DEFAULT_RECIPE = "emoji"
"""What gives the settings where nothing else does."""

BATCH_SIZE = 16
"""Pictures drawn at a time."""

NUM_TRAIN_PROMPTS = 8
"""Training prompts that are measured where a run has no evaluation."""


def settings_of(adapter: Path | None) -> Config | None:
    """The settings of the run that an adapter came from, if it is still in its folder."""
    from alignprop.config import read_config

    for folder in (adapter, adapter.parent) if adapter is not None else ():
        if (folder / "config.yaml").is_file():
            return read_config(folder / "config.yaml")
    return None


def adapter_folder(adapter: Path) -> Path:
    """The folder with the adapter's file, given it or its run.

    Raises:
        ValueError: there is none.
    """
    from alignprop.adapter_files import DIFFUSERS_FILE, holds_adapter

    for folder in (adapter, adapter / "adapter"):
        if holds_adapter(folder):
            return folder
    raise ValueError(f"adapter={str(adapter)!r} holds no {DIFFUSERS_FILE}: give an adapter's folder or a run's.")


def base_sampler(
    model: str | None, adapter: Path | None, steps: int | None, guidance: float | None
) -> tuple[Sampler, Path | None]:
    """The base model with the settings that go with it, and the folder of the adapter that is asked for."""
    from alignprop.config import Config, Model, check_call, load_pipeline, read_config, recipe_path
    from alignprop.rollout import Sampler

    folder = adapter_folder(adapter) if adapter is not None else None
    config = settings_of(adapter)
    if config is None:
        config = Config() if model not in (None, "emoji") else read_config(recipe_path(DEFAULT_RECIPE))
    changes = {"num_inference_steps": steps, "guidance_scale": guidance}
    sampling = config.sampling.model_copy(update={name: value for name, value in changes.items() if value is not None})
    pipeline = load_pipeline(config.model if model in (None, config.model.name) else Model(name=model))
    check_call(pipeline, sampling)
    return Sampler(pipeline, sampling.call()), folder


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


def measures(
    config: Config | None, names: Sequence[str], source: str | None, device: torch.device
) -> tuple[dict[str, Reward], dict[str, tuple[str, ...]]]:
    """What to measure on which prompts: as asked for, else as in the run."""
    from alignprop.config import JudgeTerm, evaluation_sets, load_terms
    from alignprop.prompts import load_prompts

    terms: Mapping[str, JudgeTerm] = {name: JudgeTerm() for name in names}
    if config is not None and not names:
        terms = {**config.judges, **config.rewards}
    if not terms:
        raise ValueError("--reward is missing: give one or more; `alignprop rewards` lists them.")
    if source is not None:
        prompts = load_prompts(source)
        return load_terms(terms, device, prompts), evaluation_sets(prompts, len(prompts.train))
    if config is None or config.prompts.train is None:
        raise ValueError("--prompts is missing: give the name of a list, a file, or module:function.")
    num_train = config.evaluation.num_train_prompts if config.evaluation else NUM_TRAIN_PROMPTS
    prompts = load_prompts(config.prompts.train, config.prompts.unseen)
    return load_terms(terms, device, prompts), evaluation_sets(prompts, num_train)
