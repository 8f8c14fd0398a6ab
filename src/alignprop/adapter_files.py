"""Adapters on disk: written for plain diffusers or, where it reads none, as a PEFT folder, and read into a pipeline."""

import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from alignprop.spec import DENOISER_NAMES, PipelineSpec, spec_of

DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
"""What ``pipeline.load_lora_weights(folder)`` looks for."""

SECOND_FILE = "pytorch_lora_weights_2.safetensors"
"""The same for the second denoiser of a pipeline that has two (Wan 2.2)."""

PEFT_FILE = "adapter_model.safetensors"
"""What ``PeftModel.from_pretrained(denoiser, folder)`` looks for, beside ``adapter_config.json``."""

FACTS_FILE = "alignprop.json"
"""Facts about a training of all weights, beside the folders of the models."""

ONLY_DENOISER = "denoiser"
"""What the only denoiser is called where its folder does not tell its name."""

_PEFT_PREFIX = "base_model.model."


def reads_lora_files(pipeline: Any, spec: PipelineSpec) -> bool:
    """Whether plain diffusers loads a LoRA file into this pipeline."""
    return spec.lora_files and hasattr(pipeline, "save_lora_weights")


def holds_adapter(folder: Path) -> bool:
    """Whether a folder is that of an adapter; one that has such a folder inside, as a run, is not."""
    return any((folder / name).is_file() for name in (DIFFUSERS_FILE, FACTS_FILE)) or bool(peft_folders(folder))


def peft_folders(folder: Path) -> dict[str, Path]:
    """The folders of an adapter that PEFT reads into its denoisers, by their names; see :func:`save_adapter`.

    That is the adapter's own folder or, where there are several denoisers, a folder inside for each. A folder inside
    that has no denoiser's name is none of them: ``adapter`` of a run, a member of a mixture, an adapter among others.
    """
    folder = Path(folder)
    if (folder / PEFT_FILE).is_file():
        return {ONLY_DENOISER: folder}
    return {name: folder / name for name in DENOISER_NAMES if (folder / name / PEFT_FILE).is_file()}


def save_adapter(
    pipeline: Any,
    spec: PipelineSpec,
    parts: Mapping[str, nn.Module],
    adapter_name: str,
    folder: Path,
    metadata: Mapping[str, Any],
) -> Path:
    """Write the LoRA of that name, in fp32.

    Args:
        pipeline: holds the adapter.
        spec: its parts.
        parts: the models that are adapted, by name: the denoisers, and text encoders if they are.
        adapter_name: PEFT's name of the adapter.
        folder: made if absent.
        metadata: facts, kept in the header of every file under ``alignprop``, beside the pipeline's class and the
            library's version.

    Returns:
        The file of the first denoiser.
    """
    from peft import get_peft_model_state_dict

    header = {"alignprop": json.dumps(_facts(pipeline, metadata), sort_keys=True)}
    states, configs = {}, {}
    for part, model in parts.items():
        state = get_peft_model_state_dict(model, adapter_name=adapter_name)
        states[part] = {name: value.detach().contiguous() for name, value in state.items()}
        configs[part] = model.peft_config[adapter_name]  # type: ignore[index]
    if reads_lora_files(pipeline, spec):
        files = _save_for_diffusers(pipeline, spec, states, configs, Path(folder))
    else:
        files = [_save_for_peft(states[part], configs[part], _peft_folder(folder, spec, part)) for part in parts]
    for file in files:
        _add_header(file, header)
    return files[0]


def _save_for_diffusers(
    pipeline: Any,
    spec: PipelineSpec,
    states: Mapping[str, Mapping[str, Tensor]],
    configs: Mapping[str, Any],
    folder: Path,
) -> list[Path]:
    """A pipeline's writer knows one denoiser: a second one gets a file of its own, under the first one's name."""
    first, *others = spec.denoisers
    groups = [[part for part in states if part not in others], *([part] for part in others)]
    files = []
    for name, group in zip((DIFFUSERS_FILE, SECOND_FILE), groups, strict=False):
        layers: dict[str, Any] = {}
        for part in group:
            own = first if part in others else part
            layers[f"{own}_lora_layers"] = states[part]
            # Without its configuration the reader takes alpha = rank.
            layers[f"{own}_lora_adapter_metadata"] = configs[part].to_dict()
        pipeline.save_lora_weights(folder, weight_name=name, **layers)
        files.append(folder / name)
    return files


def _save_for_peft(state: Mapping[str, Tensor], config: Any, folder: Path) -> Path:
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    save_file({f"{_PEFT_PREFIX}{name}": value for name, value in state.items()}, folder / PEFT_FILE)
    return folder / PEFT_FILE


def _peft_folder(folder: Path, spec: PipelineSpec, part: str) -> Path:
    return Path(folder) / part if len(spec.denoisers) > 1 else Path(folder)


def _facts(pipeline: Any, metadata: Mapping[str, Any]) -> dict[str, Any]:
    return {"pipeline": type(pipeline).__name__, "library": f"alignprop {version('alignprop')}", **metadata}


def save_models(pipeline: Any, parts: Mapping[str, nn.Module], folder: Path, metadata: Mapping[str, Any]) -> Path:
    """Write whole models, each as a folder for ``from_pretrained``, and the facts beside them.

    Args:
        pipeline: holds the models.
        parts: the models by name.
        folder: made if absent.
        metadata: facts about the training.

    Returns:
        The file of the facts.
    """
    folder = Path(folder)
    for part, model in parts.items():
        model.save_pretrained(folder / part)  # type: ignore[operator]
    (folder / FACTS_FILE).write_text(json.dumps(_facts(pipeline, metadata), sort_keys=True), encoding="utf-8")
    return folder / FACTS_FILE


def facts_of(folder: Path) -> dict[str, Any]:
    """The facts that were written with an adapter; empty for one from elsewhere."""
    from safetensors import safe_open

    if (whole := Path(folder) / FACTS_FILE).is_file():
        found: dict[str, Any] = json.loads(whole.read_text(encoding="utf-8"))
        return found
    files = [Path(folder) / DIFFUSERS_FILE, *(place / PEFT_FILE for place in peft_folders(folder).values())]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        return {}
    with safe_open(file, framework="pt") as opened:
        facts: dict[str, Any] = json.loads((opened.metadata() or {}).get("alignprop", "{}"))
    return facts


def load_adapter(
    pipeline: Any, folder: Path, *, spec: PipelineSpec | None = None, adapter_name: str | None = None
) -> None:
    """Load what :func:`save_adapter` or :func:`save_models` wrote into a pipeline without it.

    Args:
        pipeline: of the kind that the adapter was trained in.
        folder: of the adapter.
        spec: the pipeline's parts, where they cannot be known.
        adapter_name: its name in the pipeline, to load several side by side; None for the libraries' own choice.

    Raises:
        ValueError: there is no adapter for this pipeline in the folder.
    """
    folder, spec = Path(folder), spec or spec_of(pipeline)
    if (folder / FACTS_FILE).is_file():
        for part, denoiser in zip(spec.denoisers, spec.denoisers_of(pipeline), strict=True):
            trained = type(denoiser).from_pretrained(folder / part)  # type: ignore[attr-defined]
            denoiser.load_state_dict(trained.state_dict())
        return
    if reads_lora_files(pipeline, spec):
        _require(folder / DIFFUSERS_FILE)
        pipeline.load_lora_weights(folder, weight_name=DIFFUSERS_FILE, adapter_name=adapter_name)
        if len(spec.denoisers) > 1:
            _require(folder / SECOND_FILE)
            second = {"weight_name": SECOND_FILE, "load_into_transformer_2": True}
            pipeline.load_lora_weights(folder, adapter_name=adapter_name, **second)
        return
    for part, denoiser in zip(spec.denoisers, spec.denoisers_of(pipeline), strict=True):
        _load_from_peft(denoiser, _peft_folder(folder, spec, part), adapter_name or "default")


def _load_from_peft(denoiser: nn.Module, folder: Path, adapter_name: str) -> None:
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
    from safetensors.torch import load_file

    _require(folder / PEFT_FILE)
    config = LoraConfig.from_pretrained(str(folder))
    config.inference_mode = True
    inject_adapter_in_model(config, denoiser, adapter_name)
    state = {name.removeprefix(_PEFT_PREFIX): value for name, value in load_file(folder / PEFT_FILE).items()}
    result = set_peft_model_state_dict(denoiser, state, adapter_name)
    if result.unexpected_keys:
        raise ValueError(
            f"{folder / PEFT_FILE} is not of a {type(denoiser).__name__} like this one: "
            f"it has weights for {result.unexpected_keys[0]}."
        )


def _require(file: Path) -> None:
    if not file.is_file():
        raise ValueError(f"There is no {file.name} in {file.parent}: give the folder of an adapter of this pipeline.")


def _add_header(file: Path, entries: Mapping[str, str]) -> None:
    """Add entries to the metadata of a safetensors file."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(file, framework="pt") as opened:
        metadata = {**(opened.metadata() or {}), **entries}
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  # not a mapping
    save_file(tensors, file, metadata=metadata)
