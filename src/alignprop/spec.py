"""What a pipeline is made of: its denoisers, its decoder and the range of the pixels that it decodes."""

from dataclasses import dataclass
from typing import Any

from torch import nn

_DENOISERS = ("unet", "transformer", "transformer_2")
_DECODERS = ("vae", "movq", "vqgan")


@dataclass(frozen=True)
class PipelineSpec:
    """The parts of a pipeline, by the names under which it keeps them.

    Attributes:
        denoisers: models called in every denoising step; they receive the adapter.
        decoder: the model whose ``decode`` turns latents into pixels.
        value_range: what black and white are in the decoder's output.
    """

    denoisers: tuple[str, ...]
    decoder: str
    value_range: tuple[float, float] = (-1.0, 1.0)

    def denoisers_of(self, pipeline: Any) -> list[nn.Module]:
        """The denoiser models, in order."""
        return [getattr(pipeline, name) for name in self.denoisers]

    def decoder_of(self, pipeline: Any) -> nn.Module:
        """The model that decodes."""
        decoder: nn.Module = getattr(pipeline, self.decoder)
        return decoder


EXCEPTIONS: dict[str, PipelineSpec] = {
    "StableCascadeDecoderPipeline": PipelineSpec(("decoder",), "vqgan", value_range=(0.0, 1.0)),
}
"""Pipeline classes that the defaults do not describe, one row each."""


def spec_of(pipeline: Any) -> PipelineSpec:
    """The parts of a pipeline: its row in :data:`EXCEPTIONS`, or what its components are called by convention.

    Raises:
        ValueError: the pipeline has no denoiser or no decoder under a known name.
    """
    name = type(pipeline).__name__
    if name in EXCEPTIONS:
        return EXCEPTIONS[name]
    denoisers = tuple(part for part in _DENOISERS if isinstance(getattr(pipeline, part, None), nn.Module))
    decoders = [part for part in _DECODERS if isinstance(getattr(pipeline, part, None), nn.Module)]
    if not denoisers or not decoders:
        missing = f"denoiser ({', '.join(_DENOISERS)})" if not denoisers else f"decoder ({', '.join(_DECODERS)})"
        raise ValueError(
            f"{name} has no {missing} of its own: pass the pipeline that runs the denoising loop itself, "
            "or describe it with a PipelineSpec."
        )
    return PipelineSpec(denoisers, decoders[0])
