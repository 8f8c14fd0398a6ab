"""Configurations: strict, all errors at once, defaults that are the components' own, recipes that load."""

import dataclasses
import inspect
import json
import subprocess
import sys

import pytest
import yaml

from alignprop.config import ConfigError, load_config, read_config, recipes, save
from alignprop.config.errors import setting_names

FIXED = ["sampling.num_inference_steps=20", "estimator.truncation.high=2"]
"""What the messages speak of, so that the recipe may be tuned."""


def problems(*overrides, recipe="emoji"):
    with pytest.raises(ConfigError) as error:
        load_config(recipe, [*FIXED, *overrides])
    return error.value.problems


MESSAGES = {
    "training.batch_size=0": "training.batch_size=0 needs at least 1.",
    "training.steps=many": "training.steps=many needs a whole number.",
    "training.steps=1.5": "training.steps=1.5 needs a whole number.",
    "training.steps=null": "training.steps=None needs a whole number.",
    "training=3": "training=3 needs a mapping of settings.",
    "training.stepz=3": "training.stepz is no setting; did you mean training.steps?",
    "trainng.steps=3": "trainng is no setting; did you mean training?",
    "rank=8": "rank is no setting; did you mean adapter.rank?",
    "adapter.dropout=1": "adapter.dropout=1 needs less than 1.0.",
    "adapter.targets=[]": "adapter.targets=[] needs at least 1 entries.",
    "optimizer.learning_rate=-1e-3": "optimizer.learning_rate=-0.001 needs more than 0.0.",
    "optimizer.learning_rate=.nan": "optimizer.learning_rate=nan needs a finite number.",
    "optimizer.schedule=cosin": "did you mean 'cosine'?",
    "model.dtype=fp64": "model.dtype=fp64 needs one of 'fp32', 'bf16' or 'fp16'; did you mean 'fp16'?",
    "model.name=emojis": "model.name=emojis is unknown; did you mean 'emoji'?",
    "model.name=./nowhere": "model.name='./nowhere' does not exist",
    "model.scheduler=DDIMSchedule": "model.scheduler=DDIMSchedule is unknown; did you mean 'DDIMScheduler'?",
    "sampling.extra={promt: a, prompt: b}": "sampling.extra.prompt is set by the library; leave it out.",
    "sampling.extra={eta: 1}": "sampling.extra.eta has a setting of its own: sampling.eta.",
    "estimator.name=alignprob": "estimator.name=alignprob is unknown; did you mean 'alignprop'?",
    "estimator.checkpointing=blok": "estimator.checkpointing=blok needs one of",
    "estimator.memory_gb=8": "estimator.memory_gb=8 needs estimator.checkpointing=auto",
    "estimator.truncation.kind=lsat": "estimator.truncation.kind=lsat needs one of 'all', 'last', 'uniform'",
    "estimator.truncation.high=21": "estimator.truncation.high=21 needs 1 <= high <= 20, the number of denoising steps",
    "estimator.truncation.low=3": "estimator.truncation.low=3 needs at most estimator.truncation.high=2.",
    "estimator.truncation={kind: last, steps: 49}": "estimator.truncation.steps=49 needs 1 <= steps <= 20",
    "estimator.truncation={kind: last, low: 2}": "estimator.truncation.low does not go with kind=last",
    "estimator.truncation={kind: gaussian, mean: 2}": "estimator.truncation.std needs a value.",
    "rewards={}": "rewards needs at least one",
    "rewards.emoji-asthetic=1": "rewards='emoji-asthetic' is unknown; did you mean 'emoji-aesthetic'?",
    "rewards.redness.wieght=1": "rewards.redness.wieght is no setting; did you mean rewards.<name>.weight?",
    "rewards.mine.target=red": "rewards.mine.target=red is unknown",
    "judges=[emoji-klip]": "judges='emoji-klip' is unknown; did you mean 'emoji-clip'?",
    "judges={redness: 2}": "judges.redness=2 needs a mapping of settings.",
    "prompts.train=animls": "prompts.train='animls' is no list",
    "prompts.unseen=none.txt": "prompts.unseen='none.txt' cannot be read",
    "prompts.train=[1, 2]": "prompts.train=[1, 2] needs the name of a list, a .txt or .jsonl file",
    "prompts={}": "prompts.train needs a value",
    "tracking.trackers=[wandb]": "tracking.trackers=wandb needs the package wandb: pip install 'alignprop[wandb]'.",
    "tracking.trackers=[wanbd]": "did you mean 'wandb'?",
    "no-equals-sign": "--set no-equals-sign needs the form section.key=value.",
    "training.seed=[1": "--set training.seed=[1: the value is no YAML",
}


@pytest.mark.parametrize("override", MESSAGES)
def test_every_error_names_the_setting_the_value_and_the_remedy(override, monkeypatch):
    monkeypatch.setattr("alignprop.config.checks.find_spec", lambda name: None)
    told = problems(override)
    assert len(told) == 1
    assert MESSAGES[override] in told[0]


def test_all_errors_are_told_at_once():
    told = problems(
        "training.batch_size=0", "modle.name=x", "rewards.redess=1", "estimator.truncation.high=30", "nonsense"
    )
    assert len(told) == 5
    assert [
        word for line in told for word in ("batch_size", "modle", "redess", "high=30", "nonsense") if word in line
    ] == [
        "nonsense",
        "batch_size",
        "modle",
        "high=30",
        "redess",
    ]


def test_heun_may_have_more_denoising_steps_than_are_asked_for():
    assert load_config("emoji", [*FIXED, "model.scheduler=HeunDiscreteScheduler", "estimator.truncation.high=39"])


def test_overrides_are_yaml_and_create_what_is_missing():
    config = load_config(
        "emoji",
        [
            *FIXED,
            "optimizer.learning_rate=5e-4",
            "sampling.extra.clip_skip=2",
            "model.scheduler_arguments={clip_sample: false}",
            "rewards.my.own_module:fn.weight=-2",
            "rewards.emoji-aesthetic=0.5",
            "adapter.targets=[to_q, to_v]",
            "evaluation=null",
        ],
    )
    assert config.optimizer.learning_rate == 5e-4
    assert config.sampling.call() == {"num_inference_steps": 20, "guidance_scale": 3.0, "clip_skip": 2}
    assert config.model.scheduler_arguments == {"clip_sample": False}
    assert {name: term.weight for name, term in config.rewards.items()} == {
        "emoji-aesthetic": 0.5,
        "my.own_module:fn": -2,
    }
    assert config.adapter.targets == ("to_q", "to_v")
    assert config.evaluation is None


def test_another_kind_of_truncation_drops_the_keys_of_the_one_before():
    config = load_config("emoji", ["estimator.truncation.steps=3", "estimator.truncation.kind=last"])
    assert config.estimator.truncation.model_dump() == {"kind": "last", "steps": 3}


def test_defaults_are_the_components_own():
    """Configurations must not import torch, so their defaults are written twice; this holds them together."""
    from alignprop.adapters import Lora
    from alignprop.checkpointing import Checkpoints
    from alignprop.config import settings
    from alignprop.estimators import AlignProp
    from alignprop.evaluation import Evaluation
    from alignprop.trainer import Optimizer, Trainer
    from alignprop.truncation import Gaussian, Last, Uniform

    for section, component in {
        settings.AdapterSettings: Lora,
        settings.OptimizerSettings: Optimizer,
        settings.Training: Trainer,
        settings.EvaluationSettings: Evaluation,
        settings.CheckpointSettings: Checkpoints,
        settings.LastSteps: Last,
        settings.UniformSteps: Uniform,
    }.items():
        own = {field.name: field.default for field in dataclasses.fields(component)}
        ours = {name: field.default for name, field in section.model_fields.items()}
        shared = (ours.keys() & own.keys()) - {"kind"}
        assert {name: ours[name] for name in shared} == {name: own[name] for name in shared}
        assert ours.keys() - own.keys() <= {"kind", "num_threads", "num_train_prompts"}
    default = AlignProp()
    assert default.truncation == Uniform(**settings.UniformSteps().model_dump(exclude={"kind"}))
    assert settings.EstimatorSettings().checkpointing == default.checkpointing
    assert set(inspect.signature(Gaussian).parameters) == {"mean", "std"}


def test_recipes_load_and_start_with_the_command_that_runs_them():
    known = recipes()
    assert {
        "emoji",
        "emoji-alignment",
        "emoji-combined",
        "emoji-compressibility",
        "emoji-incompressibility",
        "emoji-redness",
        "flux-dev-hps",
        "sd-turbo-pickscore",
        "sd15-aesthetic",
        "sd35-hps",
        "sdxl-hps",
    } <= known.keys()
    for name, recipe in known.items():
        assert load_config(name).description == recipe.description != ""
        assert recipe.path.read_text().startswith(f"# alignprop train {name}")


def test_what_is_saved_is_read_back_whole(tmp_path):
    config = load_config(
        "emoji-redness", ["prompts.train=[a cat]", "estimator.truncation={kind: gaussian, mean: 2, std: 1}"]
    )
    save(config, tmp_path / "config.yaml")
    assert read_config(tmp_path / "config.yaml") == load_config(tmp_path / "config.yaml") == config
    written = yaml.safe_load((tmp_path / "config.yaml").read_text())
    leaves = {name for name in setting_names() if "<name>" not in name and ".truncation." not in name}
    assert all(name.split(".")[-1] in json.dumps(written) for name in leaves)


def test_a_recipe_that_does_not_exist_is_refused(tmp_path):
    assert problems(recipe="emojy") == ["recipe='emojy' is no recipe and no file; did you mean 'emoji'?"]
    (tmp_path / "broken.yaml").write_text("a: [")
    assert "cannot be read" in problems(recipe=tmp_path / "broken.yaml")[0]
    (tmp_path / "list.yaml").write_text("- a")
    assert "needs sections" in problems(recipe=tmp_path / "list.yaml")[0]


def test_settings_and_their_errors_need_no_torch():
    """`alignprop --help`, and a typing error in a setting, must not wait for it."""
    code = "import sys, alignprop.cli, alignprop.config; sys.exit('torch' in sys.modules or 'diffusers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
