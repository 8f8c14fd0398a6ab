"""What is trained in a pipeline: a low-rank adapter or all of the denoiser, and what it was before.

Trained in fp32, switched off for a reference pass, written for plain diffusers.
"""

import functools
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from alignprop import adapter_files
from alignprop.seams import swapped
from alignprop.spec import PipelineSpec, spec_of

ADAPTER_NAME = "alignprop"
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
"""The attention projections, which the paper adapts."""

TEXT_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")
"""The same in a text encoder."""


@dataclass(frozen=True)
class Lora:
    """Settings of the adapter (LoRA, arXiv 2106.09685).

    Attributes:
        rank: inner width of each update.
        alpha: the update is scaled by alpha / rank; None for alpha = rank.
        dropout: probability with which an input of the adapter is dropped in training, in [0, 1).
        targets: endings of the names of the modules that are adapted.
        text_encoders: adapt the attention of the text encoders as well, where diffusers can load that.
    """

    rank: int = 4
    alpha: float | None = None
    dropout: float = 0.0
    targets: tuple[str, ...] = ATTENTION
    text_encoders: bool = False

    def attach(self, pipeline: Any, *, spec: PipelineSpec | None = None, seed: int = 0) -> "Adapter":
        """Add the adapter to a pipeline."""
        return Adapter(pipeline, self, spec=spec, seed=seed)

    def __post_init__(self) -> None:
        """Refuse what PEFT would accept and train nothing with."""
        if self.rank < 1:
            raise ValueError(f"adapter.rank={self.rank} needs to be at least 1.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"adapter.dropout={self.dropout} needs to be in [0, 1).")


@dataclass(frozen=True)
class Full:
    """Train every weight of the denoisers: much more memory, and a file as large as the model."""

    def attach(self, pipeline: Any, *, spec: PipelineSpec | None = None, seed: int = 0) -> "FullModel":
        """Prepare the pipeline for it; nothing is drawn from the seed."""
        return FullModel(pipeline, spec=spec)


class Trainable(ABC):
    """The part of a pipeline that is trained; all the rest is frozen.

    Attributes:
        pipeline: the pipeline that holds it.
        spec: its parts.
        parts: the models that are changed, by the names under which the pipeline keeps them.
    """

    parts: dict[str, nn.Module]

    def __init__(self, pipeline: Any, spec: PipelineSpec | None) -> None:
        """Freeze the pipeline."""
        self.pipeline = pipeline
        self.spec = spec or spec_of(pipeline)
        for part in pipeline.components.values():
            if isinstance(part, nn.Module):
                part.requires_grad_(False)
        self.parts = dict(zip(self.spec.denoisers, self.spec.denoisers_of(pipeline), strict=True))
        for denoiser in self.parts.values():
            _refuse_fused(denoiser)

    @property
    @abstractmethod
    def parameters(self) -> dict[str, nn.Parameter]:
        """The trained weights by name, in fp32 or wider."""

    @abstractmethod
    def train(self) -> None:
        """Switch dropout on, where the adapter has some."""

    @abstractmethod
    def eval(self) -> None:
        """Switch it off."""

    @abstractmethod
    def disabled(self) -> AbstractContextManager[None]:
        """The model as it was before training: for a reference pass."""

    @abstractmethod
    def save(self, folder: Path, metadata: Mapping[str, Any] | None = None) -> Path:
        """Write it for :func:`alignprop.adapter_files.load_adapter`.

        Args:
            folder: made if absent.
            metadata: facts about the training, kept beside the weights.

        Returns:
            A file that was written.
        """

    @contextmanager
    def weights(self, values: Mapping[str, Tensor] | None = None, *, as_reloaded: bool = True) -> Iterator[None]:
        """Hold other weights for a while.

        Args:
            values: weights by parameter name (an average, say); None for the present ones.
            as_reloaded: round them to the base's dtype, as a pipeline does when it loads the saved adapter, so that
                what is evaluated is what will be sampled.
        """
        parameters = self.parameters
        before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        dtypes = self._base_dtypes()
        try:
            with torch.no_grad():
                for name, parameter in parameters.items():
                    value = before[name] if values is None else values[name]
                    parameter.copy_(value.to(dtypes[name.split(".")[0]]) if as_reloaded else value)
            yield
        finally:
            with torch.no_grad():
                for name, parameter in parameters.items():
                    parameter.copy_(before[name])

    def _base_dtypes(self) -> dict[str, torch.dtype]:
        return {
            part: next(p.dtype for name, p in model.named_parameters() if f".{ADAPTER_NAME}." not in name)
            for part, model in self.parts.items()
        }

    @property
    def base_dtype(self) -> torch.dtype:
        """The dtype of the (first) denoiser's own weights."""
        return next(iter(self._base_dtypes().values()))


class Adapter(Trainable):
    """The trainable LoRA inside a pipeline, and the only thing of it that is trained."""

    def __init__(
        self,
        pipeline: Any,
        lora: Lora = Lora(),
        *,
        spec: PipelineSpec | None = None,
        seed: int = 0,
    ) -> None:
        """Freeze the pipeline and add the adapter to its denoisers.

        Args:
            pipeline: a diffusers pipeline. Adapters that it already has stay active and are frozen.
            lora: the adapter's settings.
            spec: the pipeline's parts, where they cannot be known.
            seed: of the adapter's initial weights. Its update is zero at first whatever the seed.

        Raises:
            ValueError: nothing in the denoiser answers to ``lora.targets``, the projections are fused (which would
                drop the adapter silently), or an adapter of this name is there already.
        """
        super().__init__(pipeline, spec)
        for denoiser in self.parts.values():
            _add_lora(denoiser, lora, lora.targets, seed)
        if lora.text_encoders:
            encoders = _adaptable_encoders(pipeline, self.spec)
            for encoder in encoders.values():
                _add_lora(encoder, lora, TEXT_ATTENTION, seed)
            self.parts |= encoders
        self.eval()

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The trained weights by name, in fp32 whatever the base's dtype is."""
        return {
            f"{part}.{name}": parameter
            for part, model in self.parts.items()
            for name, parameter in model.named_parameters()
            if f".{ADAPTER_NAME}." in name
        }

    def train(self) -> None:
        """Switch the adapter's dropout on."""
        self._set_training(True)

    def eval(self) -> None:
        """Switch the adapter's dropout off."""
        self._set_training(False)

    def _set_training(self, training: bool) -> None:
        for layer in self._layers():
            layer.lora_dropout[ADAPTER_NAME].train(training)

    def _layers(self) -> Iterator[Any]:
        from peft.tuners.lora import LoraLayer

        for model in self.parts.values():
            for module in model.modules():
                if isinstance(module, LoraLayer) and ADAPTER_NAME in module.lora_dropout:
                    yield module

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The base model, with the adapters that it came with: for a reference pass.

        Only the layers' list of active adapters changes, never ``requires_grad``.
        """
        with ExitStack() as stack:
            for layer in self._layers():
                others = [name for name in layer.active_adapters if name != ADAPTER_NAME]
                stack.enter_context(swapped(layer, "_active_adapter", others))
            yield

    def save(self, folder: Path, metadata: Mapping[str, Any] | None = None) -> Path:
        """Write the adapter for plain diffusers, or as a PEFT folder where that reads none into the pipeline.

        Args:
            folder: made if absent.
            metadata: facts about the training, kept in the file's header under ``alignprop``.

        Returns:
            The file, of the first denoiser if there are several. :func:`alignprop.adapter_files.load_adapter` reads it.
        """
        return adapter_files.save_adapter(self.pipeline, self.spec, self.parts, ADAPTER_NAME, folder, metadata or {})


class FullModel(Trainable):
    """Every weight of the denoisers."""

    def __init__(self, pipeline: Any, *, spec: PipelineSpec | None = None) -> None:
        """Let the denoisers train.

        Args:
            pipeline: a diffusers pipeline.
            spec: the pipeline's parts, where they cannot be known.

        Raises:
            ValueError: the denoisers are in half precision, in which small updates are rounded away.
        """
        super().__init__(pipeline, spec)
        if self.base_dtype in (torch.float16, torch.bfloat16):
            raise ValueError(
                f"adapter.kind=full needs a denoiser in fp32, and it is in {self.base_dtype}: its small updates would "
                "be rounded away. Use model.dtype=fp32, or adapter.kind=lora."
            )
        for denoiser in self.parts.values():
            denoiser.requires_grad_(True)
        self._before = {name: value.detach().clone() for name, value in self.parameters.items()}

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The denoisers' weights by name."""
        return {
            f"{part}.{name}": value for part, model in self.parts.items() for name, value in model.named_parameters()
        }

    def train(self) -> None:
        """Nothing to do: the base was trained with what dropout it has."""

    def eval(self) -> None:
        """Nothing to do."""

    def disabled(self) -> AbstractContextManager[None]:
        """The model as it was before training, from a copy."""
        return self.weights(self._before, as_reloaded=False)

    def save(self, folder: Path, metadata: Mapping[str, Any] | None = None) -> Path:
        """Write the denoisers, each as a folder for ``from_pretrained``."""
        return adapter_files.save_models(self.pipeline, self.parts, folder, metadata or {})


def _adaptable_encoders(pipeline: Any, spec: PipelineSpec) -> dict[str, nn.Module]:
    known = getattr(pipeline, "_lora_loadable_modules", ())
    found = {name: encoder for name, encoder in spec.text_encoders_of(pipeline).items() if name in known}
    if not found:
        raise ValueError(
            f"adapter.text_encoders=True: diffusers loads no LoRA into a text encoder of {type(pipeline).__name__}; "
            "leave it out."
        )
    return found


def _add_lora(model: Any, lora: Lora, targets: Sequence[str], seed: int) -> None:
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import LoraLayer

    before = sorted({name for m in model.modules() if isinstance(m, LoraLayer) for name in m.active_adapters})
    if ADAPTER_NAME in before:
        raise ValueError(f"The pipeline already has an adapter named {ADAPTER_NAME!r}: load the pipeline afresh.")
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.rank if lora.alpha is None else lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=list(targets),
        init_lora_weights="gaussian",
    )
    # A model without a loader of its own is given the layers by PEFT itself.
    add = getattr(model, "add_adapter", None) or functools.partial(inject_adapter_in_model, model=model)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            add(config, adapter_name=ADAPTER_NAME)
        except ValueError as error:
            raise ValueError(
                f"adapter.targets={list(targets)} fits no module of {type(model).__name__}: "
                "give endings of module names, such as 'to_q'."
            ) from error
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            layer.set_adapter([name for name in (*before, ADAPTER_NAME) if name in layer.lora_A])
    for name, parameter in model.named_parameters():
        ours = f".{ADAPTER_NAME}." in name
        parameter.requires_grad_(ours)
        if ours:
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))


def _refuse_fused(denoiser: nn.Module) -> None:
    if any(getattr(module, "fused_projections", False) for module in denoiser.modules()):
        raise ValueError(
            f"{type(denoiser).__name__} has fused q, k, v projections, which would silently drop the adapter: "
            "call pipeline.unfuse_qkv_projections() first."
        )
