"""How strongly an adapter acts when it is sampled with: 0 is the base model, 1 what was trained.

What an adapter learnt of a reward's mistakes it often learnt last, so that less of it may be better than all of it,
and more of a cautious one better still; on prompts that were not trained one can choose.
"""

from __future__ import annotations

from typing import Any

from peft.tuners.lora.layer import LoraLayer

from alignprop.spec import PipelineSpec, spec_of


def set_strength(pipeline: Any, strength: float, spec: PipelineSpec | None = None) -> None:
    """Multiply the update of the active adapters of a pipeline; calling it again replaces the strength.

    Args:
        pipeline: with adapters loaded.
        strength: any number; below 0 it leads away from what was trained.
        spec: the pipeline's parts, where they cannot be known.

    Raises:
        ValueError: no adapter is loaded.
    """
    spec = spec or spec_of(pipeline)
    models = [*spec.denoisers_of(pipeline), *spec.text_encoders_of(pipeline).values()]
    layers = [module for model in models for module in model.modules() if isinstance(module, LoraLayer)]
    if not layers:
        raise ValueError(f"{type(pipeline).__name__} has no adapter whose strength could be set: load one first.")
    for layer in layers:
        for adapter in layer.active_adapters:
            layer.set_scale(adapter, strength)
