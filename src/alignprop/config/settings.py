"""The settings of a run: typed, frozen, strict. Every default of a run is in this file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

Count: TypeAlias = Annotated[int, Field(ge=1)]
Natural: TypeAlias = Annotated[int, Field(ge=0)]
Positive: TypeAlias = Annotated[float, Field(gt=0)]
Fraction: TypeAlias = Annotated[float, Field(ge=0, lt=1)]

ESTIMATORS = {
    "alignprop": "alignprop.estimators.alignprop:AlignProp",
    "alignprop-as-released": "alignprop.estimators.as_released:AsReleased",
    "ddpo": "alignprop.estimators.ddpo:DDPO",
    "draft-k": "alignprop.estimators.draft_k:DraftK",
    "draft-lv": "alignprop.estimators.draft_lv:DraftLV",
    "drtune": "alignprop.estimators.drtune:DRTune",
    "flowbp-sparse": "alignprop.estimators.flowbp:FlowBPSparse",
    "leapalign": "alignprop.estimators.leapalign:LeapAlign",
    "refl": "alignprop.estimators.refl:ReFL",
    "rwr": "alignprop.estimators.rwr:RWR",
}
"""Estimators by name, as ``module:attribute``; their attributes are the settings in ``estimator.arguments``."""


class Section(BaseModel):
    """A group of settings. It cannot be changed, and knows no other keys than its own."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Model(Section):
    """The pipeline that is aligned.

    Attributes:
        name: ``emoji`` (embedded), a folder, a ``.safetensors`` file, or the name of a model on the hub.
        dtype: of the weights; the decoder stays in fp32 beside fp16 (it overflows there).
        revision: of a model on the hub.
        variant: of a model on the hub, such as ``fp16``.
        pipeline: class of the pipeline; null takes what the model says, and StableDiffusionPipeline for a file.
        config: for a file, the folder or the name on the hub of a pipeline that is built alike; null recognises the
            model by its weights and asks the hub.
        scheduler: class of the scheduler, made from the configuration of the pipeline's own; null keeps that one.
        scheduler_arguments: changes of the scheduler's configuration.
        device: null takes the fastest there is.
    """

    name: str = "emoji"
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    revision: str | None = None
    variant: str | None = None
    pipeline: str | None = None
    config: str | None = None
    scheduler: str | None = None
    scheduler_arguments: dict[str, Any] = {}
    device: str | None = None


class Sampling(Section):
    """Arguments of the pipeline's call, in training and evaluation alike. Those that are null are not passed.

    Attributes:
        num_inference_steps: denoising steps.
        guidance_scale: of classifier-free guidance.
        eta: of DDIM's noise, 0 for none.
        height: of the pictures, in pixels.
        width: of the pictures, in pixels.
        negative_prompt: for every picture.
        extra: any further argument of the pipeline's call.
    """

    num_inference_steps: Count | None = None
    guidance_scale: float | None = None
    eta: Annotated[float, Field(ge=0, le=1)] | None = None
    height: Count | None = None
    width: Count | None = None
    negative_prompt: str | None = None
    extra: dict[str, Any] = {}

    def call(self) -> dict[str, Any]:
        """The arguments as the pipeline takes them."""
        return {**self.model_dump(exclude={"extra"}, exclude_none=True), **self.extra}


class AdapterSettings(Section):
    """What is trained.

    Attributes:
        kind: a LoRA (see :class:`alignprop.adapters.Lora`, of which the other settings are), or the full denoiser.
    """

    kind: Literal["lora", "full"] = "lora"
    rank: Count = 4
    alpha: Positive | None = None
    dropout: Fraction = 0.0
    targets: Annotated[tuple[str, ...], Field(min_length=1)] = ("to_q", "to_k", "to_v", "to_out.0")
    text_encoders: bool = False


class AllSteps(Section):
    """Every denoising step is live."""

    kind: Literal["all"]


class LastSteps(Section):
    """The last ``steps`` denoising steps are live, always."""

    kind: Literal["last"]
    steps: Count = 1


class UniformSteps(Section):
    """K is uniform in [low, high]; null for the number of denoising steps."""

    kind: Literal["uniform"] = "uniform"
    low: Count = 1
    high: Count | None = None


class GaussianSteps(Section):
    """K is normal around ``mean``, rounded and moved into the range that there is."""

    kind: Literal["gaussian"]
    mean: Annotated[float, Field(ge=1)]
    std: Annotated[float, Field(ge=0)]


TruncationSettings: TypeAlias = AllSteps | LastSteps | UniformSteps | GaussianSteps


class EstimatorSettings(Section):
    """How rollouts become gradients.

    Attributes:
        name: a row of :data:`ESTIMATORS`.
        arguments: of the estimator, see `alignprop estimators`.
        truncation: how many of the last denoising steps are live; others than ``alignprop`` choose their steps by
            their own rule, and take no notice of it.
        checkpointing: what is recomputed to save memory; ``auto`` measures, and takes the fastest that fits.
        memory_gb: what ``auto`` may use; null for what is free.
    """

    name: str = "alignprop"
    arguments: dict[str, Any] = {}
    truncation: Annotated[TruncationSettings, Field(discriminator="kind")] = UniformSteps()
    checkpointing: Literal["none", "step", "block", "nested", "auto"] = "none"
    memory_gb: Positive | None = None


class RegularisationSettings(Section):
    """What keeps the model near its base, and the gradient within bounds.

    Attributes:
        kl: weight of the divergence from the base model along the live denoising steps, taken off the reward.
        l2: weight of the mean squared difference between its predictions and the tuned model's, taken off the reward.
        max_step_grad_norm: bound of the norm of the gradient of each picture at the latents of each live denoising
            step; null for none.
    """

    kl: Annotated[float, Field(ge=0)] = 0.0
    l2: Annotated[float, Field(ge=0)] = 0.0
    max_step_grad_norm: Positive | None = None


class JudgeTerm(Section):
    """A reward that is measured and not trained.

    Attributes:
        target: ``module:attribute``, where the key is a name of your own choice.
        arguments: of the reward.
        frames: of a video on which a reward of pictures is applied, evenly spaced.
        per_prompt: whether the lines of a JSONL prompt file choose the reward or its arguments for their prompt, with
            the fields ``reward`` and ``arguments``; a line without them gets this one as it is.
    """

    target: str | None = None
    arguments: dict[str, Any] = {}
    frames: Count | None = None
    per_prompt: bool = False


class Augmentation(Section):
    """Random views of a picture over which a reward is averaged; see :class:`alignprop.rewards.Augmented`.

    Attributes:
        views: how many; each costs what the reward costs.
        shift: largest shift in pixels.
        crop: largest part of height and width that is cut away before the rest is enlarged again.
        noise: deviation of Gaussian noise, where white is 1.
    """

    views: Count = 4
    shift: Natural = 2
    crop: Annotated[float, Field(ge=0, le=0.5)] = 0.1
    noise: Annotated[float, Field(ge=0, le=1)] = 0.02


def _augmentation(value: Any) -> Any:
    """True and false for the defaults and for none."""
    return ({} if value else None) if isinstance(value, bool) else value


class RewardTerm(JudgeTerm):
    """A reward that is trained.

    Scores are reported as the reward gives them; ``clamp_above`` and ``normalise`` change what is optimised.

    Attributes:
        weight: in the sum; negative to push it down.
        clamp_above: score that is enough: above it the gradient is exactly zero.
        normalise: whether the weight is of the reward in deviations of its own scores, by running statistics.
        augment: random views over which it is averaged in training; true for the defaults.
        checkpoint: whether its activations are computed again in the backward pass, to save memory.
    """

    weight: float = 1.0
    clamp_above: float | None = None
    normalise: bool = False
    augment: Annotated[Augmentation | None, BeforeValidator(_augmentation)] = None
    checkpoint: bool = False


def _judges(value: Any) -> Any:
    """A name or a list of names, as a mapping."""
    names = [value] if isinstance(value, str) else value
    return {str(name): {} for name in names} if isinstance(names, (list, tuple)) else value


def _rewards(value: Any) -> Any:
    """The same, where a bare number is a weight."""
    terms = _judges(value)
    if not isinstance(terms, Mapping):
        return terms
    return {name: term if isinstance(term, (Mapping, Section)) else {"weight": term} for name, term in terms.items()}


def _prompt_source(value: Any) -> Any:
    if isinstance(value, (list, tuple)) and value and all(isinstance(prompt, str) for prompt in value):
        return tuple(value)
    if value is None or isinstance(value, str):
        return value
    raise ValueError("the name of a list, a .txt or .jsonl file, module:function, or a list of prompts")


PromptSetting: TypeAlias = Annotated[str | tuple[str, ...] | None, BeforeValidator(_prompt_source)]


class PromptSettings(Section):
    """Prompts to train on, and others that are only evaluated.

    Attributes:
        train: the name of a list, a ``.txt`` or ``.jsonl`` file, ``module:function``, or the prompts themselves.
        unseen: the same; null for the held-out part of a named list.
    """

    train: PromptSetting = None
    unseen: PromptSetting = None


class OptimizerSettings(Section):
    """AdamW and the step; see :class:`alignprop.optimisation.Optimizer`."""

    learning_rate: Positive = 1e-3
    warmup_steps: Natural = 0
    schedule: Literal["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"] = (
        "constant_with_warmup"
    )
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    eps: Positive = 1e-8
    max_grad_norm: Positive = 1.0
    ema_decay: Fraction | None = None


class Training(Section):
    """The loop; see :class:`alignprop.trainer.Trainer`.

    Attributes:
        images_per_prompt: pictures of each prompt in succession; several help ddpo and rwr, which compare them.
        max_images: end once so many images have been scored.
        max_seconds: end once the steps have taken so long, evaluations apart.
        num_threads: of torch on CPU; null leaves the choice to torch.
    """

    steps: Count = 100
    batch_size: Count = 4
    accumulation: Count = 1
    images_per_prompt: Count = 1
    seed: Natural = 0
    max_images: Count | None = None
    max_seconds: Positive | None = None
    num_threads: Count | None = None


class EvaluationSettings(Section):
    """What is measured at intervals; see :class:`alignprop.evaluation.Evaluation`.

    Attributes:
        every_images: evaluate each time so many more images have been scored, and not by steps.
        every_seconds: evaluate each time the steps have taken so much longer, and not by steps.
        num_train_prompts: how many training prompts are evaluated beside the unseen ones, evenly spaced in the list.
    """

    every: Count = 25
    every_images: Count | None = None
    every_seconds: Positive | None = None
    images_per_prompt: Count = 4
    batch_size: Count = 16
    seed: Natural = 1234
    num_train_prompts: Natural = 8


class GuardSettings(Section):
    """What notices that the reward is being fooled; see :class:`alignprop.guard.Guard`."""

    keep: Literal["guarded", "reward"] = "guarded"
    judge_weight: Annotated[float, Field(ge=0)] = 1.5
    max_gain: Positive | None = 2.0
    max_fall: Positive | None = 1.0
    min_diversity: Fraction | None = 0.1
    max_saturated: Fraction | None = 0.2
    window: Count | None = 3
    max_loss: Positive = 0.3


class CheckpointSettings(Section):
    """What resuming needs; see :class:`alignprop.checkpointing.Checkpoints`."""

    every: Count = 50
    keep: Count = 2


class Tracking(Section):
    """Where metrics go beside the run folder."""

    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    project: str = "alignprop"


class Run(Section):
    """Where the run's files go: ``folder/name``.

    Attributes:
        name: null for the recipe's name and the time.
    """

    name: str | None = None
    folder: str = "runs"


class Config(Section):
    """Everything that makes a run.

    Attributes:
        combination: how the gradients of several rewards become one; see :mod:`alignprop.surgery`.
    """

    description: str = ""
    model: Model = Model()
    sampling: Sampling = Sampling()
    adapter: AdapterSettings = AdapterSettings()
    estimator: EstimatorSettings = EstimatorSettings()
    regularisation: RegularisationSettings = RegularisationSettings()
    rewards: Annotated[dict[str, RewardTerm], BeforeValidator(_rewards)] = {}
    combination: Literal["sum", "pcgrad", "mgda"] = "sum"
    judges: Annotated[dict[str, JudgeTerm], BeforeValidator(_judges)] = {}
    prompts: PromptSettings = PromptSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    training: Training = Training()
    evaluation: EvaluationSettings | None = EvaluationSettings()
    guard: GuardSettings | None = GuardSettings()
    checkpoints: CheckpointSettings = CheckpointSettings()
    tracking: Tracking = Tracking()
    run: Run = Run()
