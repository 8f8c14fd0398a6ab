"""Configurations: typed and strict settings, recipes, and the trainer that they describe."""

from alignprop.config.building import (
    build,
    check_call,
    device_of,
    evaluation_sets,
    guard_of,
    load_pipeline,
    load_terms,
    probe_trainer,
    shaped,
)
from alignprop.config.errors import ConfigError
from alignprop.config.estimators import EstimatorDescription, describe_estimators
from alignprop.config.loading import Recipe, load_config, read_config, read_overrides, recipe_path, recipes, save
from alignprop.config.settings import Config, EstimatorSettings, JudgeTerm, Model, Run

__all__ = [
    "Config",
    "ConfigError",
    "EstimatorDescription",
    "EstimatorSettings",
    "JudgeTerm",
    "Model",
    "Recipe",
    "Run",
    "build",
    "check_call",
    "describe_estimators",
    "device_of",
    "evaluation_sets",
    "guard_of",
    "load_config",
    "load_pipeline",
    "load_terms",
    "probe_trainer",
    "read_config",
    "read_overrides",
    "recipe_path",
    "recipes",
    "save",
    "shaped",
]
