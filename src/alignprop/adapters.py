"""Low-rank adapters: put into a pipeline, trained in fp32, switched off for a reference pass, written for diffusers."""

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from alignprop.seams import swapped
from alignprop.spec import PipelineSpec, spec_of

ADAPTER_NAME = "alignprop"
ADAPTER_FILE = "pytorch_lora_weights.safetensors"
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
"""The attention projections, which the paper adapts."""


@dataclass(frozen=True)
class Lora:
    """Settings of the adapter (LoRA, arXiv 2106.09685).

    Attributes:
        rank: inner width of each update.
        alpha: the update is scaled by alpha / rank; None for alpha = rank.
        dropout: probability with which an input of the adapter is dropped in training, in [0, 1).
        targets: endings of the names of the modules that are adapted.
    """

    rank: int = 4
    alpha: float | None = None
    dropout: float = 0.0
    targets: tuple[str, ...] = ATTENTION

    def __post_init__(self) -> None:
        """Refuse what PEFT would accept and train nothing with."""
        if self.rank < 1:
            raise ValueError(f"adapter.rank={self.rank} needs to be at least 1.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"adapter.dropout={self.dropout} needs to be in [0, 1).")


class Adapter:
    """The trainable LoRA inside a pipeline, and the only thing of it that is trained.

    Attributes:
        pipeline: the pipeline that holds it.
        spec: its parts.
    """

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
        self.pipeline = pipeline
        self.spec = spec or spec_of(pipeline)
        for part in pipeline.components.values():
            if isinstance(part, nn.Module):
                part.requires_grad_(False)
        for denoiser in self.spec.denoisers_of(pipeline):
            _refuse_fused(denoiser)
            _add_lora(denoiser, lora, seed)
        self.eval()

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The trained weights by name, in fp32 whatever the base's dtype is."""
        return {
            f"{part}.{name}": parameter
            for part, denoiser in zip(self.spec.denoisers, self.spec.denoisers_of(self.pipeline), strict=True)
            for name, parameter in denoiser.named_parameters()
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

        for denoiser in self.spec.denoisers_of(self.pipeline):
            for module in denoiser.modules():
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
            part: next(p.dtype for name, p in denoiser.named_parameters() if f".{ADAPTER_NAME}." not in name)
            for part, denoiser in zip(self.spec.denoisers, self.spec.denoisers_of(self.pipeline), strict=True)
        }

    @property
    def base_dtype(self) -> torch.dtype:
        """The dtype of the (first) denoiser's own weights."""
        return next(iter(self._base_dtypes().values()))

    def save(self, folder: Path, metadata: Mapping[str, Any] | None = None) -> Path:
        """Write ``pytorch_lora_weights.safetensors``, which ``pipeline.load_lora_weights(folder)`` reads.

        Args:
            folder: made if absent.
            metadata: facts about the training, kept in the file's header under ``alignprop``.

        Raises:
            ValueError: the pipeline's class has no LoRA writer of its own.
        """
        from peft import get_peft_model_state_dict

        if not hasattr(self.pipeline, "save_lora_weights"):
            raise ValueError(f"{type(self.pipeline).__name__} cannot load LoRA files, so none is written.")
        layers: dict[str, Any] = {}
        for part, denoiser in zip(self.spec.denoisers, self.spec.denoisers_of(self.pipeline), strict=True):
            state = get_peft_model_state_dict(denoiser, adapter_name=ADAPTER_NAME)
            config: Any = denoiser.peft_config
            layers[f"{part}_lora_layers"] = {name: value.contiguous() for name, value in state.items()}
            # Without its configuration the reader takes alpha = rank.
            layers[f"{part}_lora_adapter_metadata"] = config[ADAPTER_NAME].to_dict()
        self.pipeline.save_lora_weights(folder, **layers)
        file = Path(folder) / ADAPTER_FILE
        _add_header(file, {"alignprop": json.dumps(dict(metadata or {}), sort_keys=True)})
        return file


def _add_lora(denoiser: Any, lora: Lora, seed: int) -> None:
    from peft import LoraConfig
    from peft.tuners.lora import LoraLayer

    before = sorted({name for m in denoiser.modules() if isinstance(m, LoraLayer) for name in m.active_adapters})
    if ADAPTER_NAME in before:
        raise ValueError(f"The pipeline already has an adapter named {ADAPTER_NAME!r}: load the pipeline afresh.")
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.rank if lora.alpha is None else lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=list(lora.targets),
        init_lora_weights="gaussian",
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            denoiser.add_adapter(config, adapter_name=ADAPTER_NAME)
        except ValueError as error:
            raise ValueError(
                f"adapter.targets={list(lora.targets)} fits no module of {type(denoiser).__name__}: "
                "give endings of module names, such as 'to_q'."
            ) from error
    denoiser.set_adapter([*before, ADAPTER_NAME])
    for name, parameter in denoiser.named_parameters():
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


def _add_header(file: Path, entries: Mapping[str, str]) -> None:
    """Add entries to the metadata of a safetensors file."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(file, framework="pt") as opened:
        metadata = {**(opened.metadata() or {}), **entries}
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  # not a mapping
    save_file(tensors, file, metadata=metadata)
