"""What a pipeline is made of: its denoisers, its decoder, the range of its pixels and what it is conditioned on."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

_DENOISERS = ("unet", "transformer", "transformer_2")
_DECODERS = ("vae", "movq", "vqgan")
_TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")

Conditions = Callable[[Any, Sequence[str]], dict[str, Any]]
"""From a pipeline and prompts to the arguments of its call that ask for one picture of each."""


def prompted(pipeline: Any, prompts: Sequence[str]) -> dict[str, Any]:
    """The prompts as they are."""
    return {"prompt": list(prompts)}


def labelled(pipeline: Any, prompts: Sequence[str]) -> dict[str, Any]:
    """The classes of the pipeline's own list of labels that the prompts name.

    Raises:
        ValueError: a prompt is no label of the pipeline.
    """
    return {"class_labels": pipeline.get_label_ids(list(prompts))}


def unconditional(pipeline: Any, prompts: Sequence[str]) -> dict[str, Any]:
    """Their number: the prompts mean nothing to the pipeline."""
    return {"batch_size": len(prompts)}


@dataclass(frozen=True)
class PipelineSpec:
    """The parts of a pipeline, by the names under which it keeps them.

    Attributes:
        denoisers: models called in every denoising step; they receive the adapter.
        decoder: the model whose ``decode`` turns latents into pixels; None where the last scheduler step gives pixels.
        value_range: what black and white are in the decoder's output.
        conditions: how its call takes prompts.
        lora_files: whether plain diffusers reads a LoRA file into it; if not, the adapter is a PEFT folder.
        output_type: what to ask its call for, to be given values in [0, 1].
    """

    denoisers: tuple[str, ...]
    decoder: str | None
    value_range: tuple[float, float] = (-1.0, 1.0)
    conditions: Conditions = field(default=prompted, repr=False)
    lora_files: bool = True
    output_type: str = "pt"

    def denoisers_of(self, pipeline: Any) -> list[nn.Module]:
        """The denoiser models, in order."""
        return [getattr(pipeline, name) for name in self.denoisers]

    def text_encoders_of(self, pipeline: Any) -> dict[str, nn.Module]:
        """The text encoders by name, as far as there are any."""
        found = {name: getattr(pipeline, name, None) for name in _TEXT_ENCODERS}
        return {name: encoder for name, encoder in found.items() if isinstance(encoder, nn.Module)}

    def decoder_of(self, pipeline: Any) -> nn.Module | None:
        """The model that decodes, where there is one."""
        decoder: nn.Module | None = getattr(pipeline, self.decoder) if self.decoder else None
        return decoder


EXCEPTIONS: dict[str, PipelineSpec] = {
    "ConsistencyModelPipeline": PipelineSpec(("unet",), None, conditions=unconditional),
    "DDIMPipeline": PipelineSpec(("unet",), None, conditions=unconditional),
    "DDPMPipeline": PipelineSpec(("unet",), None, conditions=unconditional),
    "DiTPipeline": PipelineSpec(("transformer",), "vae", conditions=labelled),
    # Its reader of LoRA files looks for a text_encoder name; asked for tensors, it forgets to map them to [0, 1].
    "Kandinsky3Pipeline": PipelineSpec(("unet",), "movq", lora_files=False, output_type="np"),
    "StableCascadeDecoderPipeline": PipelineSpec(("decoder",), "vqgan", value_range=(0.0, 1.0)),
}
"""Pipeline classes that the defaults do not describe, one row each."""

DENOISER_NAMES = tuple(dict.fromkeys((*_DENOISERS, *(name for spec in EXCEPTIONS.values() for name in spec.denoisers))))
"""Every name under which a known pipeline keeps a denoiser."""


def spec_of(pipeline: Any) -> PipelineSpec:
    """The parts of a pipeline: its row in :data:`EXCEPTIONS`, or what its components are called by convention.

    Raises:
        ValueError: the pipeline has no denoiser or no decoder under a known name.
    """
    from diffusers import DiffusionPipeline

    name = type(pipeline).__name__
    if name in EXCEPTIONS:
        return EXCEPTIONS[name]
    if any(isinstance(part, DiffusionPipeline) for part in vars(pipeline).values()):
        raise ValueError(f"{name} is built of other pipelines: pass the pipeline that runs the denoising loop itself.")
    denoisers = tuple(part for part in _DENOISERS if isinstance(getattr(pipeline, part, None), nn.Module))
    decoders = [part for part in _DECODERS if isinstance(getattr(pipeline, part, None), nn.Module)]
    if not denoisers or not decoders:
        missing = f"denoiser ({', '.join(_DENOISERS)})" if not denoisers else f"decoder ({', '.join(_DECODERS)})"
        raise ValueError(
            f"{name} has no {missing} of its own: pass the pipeline that runs the denoising loop itself, "
            "or describe it with a PipelineSpec."
        )
    return PipelineSpec(denoisers, decoders[0])
