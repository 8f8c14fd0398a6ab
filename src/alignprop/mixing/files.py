"""Adapters read from disk as low-rank updates by layer, and mixtures of them written as any other adapter."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from alignprop.adapter_files import (
    DIFFUSERS_FILE,
    FACTS_FILE,
    ONLY_DENOISER,
    PEFT_FILE,
    SECOND_FILE,
    facts_of,
    peft_folders,
)
from alignprop.export import Update
from alignprop.mixing.weightspace import Mixture, require_same_shapes

Layout = Literal["diffusers", "peft"]
"""A file that a diffusers pipeline reads, or folders that PEFT reads into its denoisers."""

_PARTS = ("unet", "transformer", "transformer_2", "text_encoder", "text_encoder_2", "text_encoder_3")
_PEFT_PREFIX = "base_model.model."
_PEFT_SETTINGS = "adapter_config.json"
_FACTORS = re.compile(
    r"(?P<module>.+?)\.(?:lora_(?P<factor>[AB])|lora(?:_linear_layer)?\.(?P<older>down|up))\.weight"  # nothing else
)


@dataclass(frozen=True)
class StoredAdapter:
    """An adapter as it is on disk.

    Attributes:
        folder: that holds it.
        layout: how it is written.
        updates: by the name of the part and of the module, as in ``unet.mid_block.attentions.0.proj_in``.
        facts: of its header.
    """

    folder: Path
    layout: Layout
    updates: Mapping[str, Update]
    facts: Mapping[str, Any]

    @property
    def model(self) -> str | None:
        """The base model that it was trained on, if its header tells."""
        name = self.facts.get("config", {}).get("model", {}).get("name")
        return None if name is None else str(name)

    @property
    def files(self) -> list[Path]:
        """All that makes it, and nothing else of the folder."""
        if self.layout == "diffusers":
            return [file for name in (DIFFUSERS_FILE, SECOND_FILE) if (file := self.folder / name).is_file()]
        return [place / name for place in peft_folders(self.folder).values() for name in (_PEFT_SETTINGS, PEFT_FILE)]


def read_adapter(folder: Path) -> StoredAdapter:
    """Read the LoRA in a folder, of every part that it adapts.

    Raises:
        ValueError: there is none, or it is more than a LoRA: all weights, DoRA, biases, grouped convolutions, or the
            names of another program.
    """
    folder = Path(folder)
    if (folder / FACTS_FILE).is_file():
        raise ValueError(f"{folder} holds all weights of a model (adapter.kind=full), and only LoRAs are mixed.")
    first, second = folder / DIFFUSERS_FILE, folder / SECOND_FILE
    updates: dict[str, Update] = {}
    layout: Layout = "diffusers"
    if first.is_file():
        updates |= _read_file(first)
        if second.is_file():
            updates |= {name.replace("transformer.", "transformer_2.", 1): u for name, u in _read_file(second).items()}
    else:
        layout = "peft"
        for part, place in peft_folders(folder).items():
            settings = _peft_settings(place)
            tensors = {name.removeprefix(_PEFT_PREFIX): value for name, value in _tensors(place / PEFT_FILE).items()}
            updates |= {f"{part}.{name}": u for name, u in _updates(tensors, settings, place / PEFT_FILE).items()}
    if not updates:
        raise ValueError(f"{folder} holds no {DIFFUSERS_FILE} and no {PEFT_FILE}: give an adapter's folder or a run's.")
    return StoredAdapter(folder, layout, updates, facts_of(folder))


def require_alike(adapters: Mapping[str, StoredAdapter], *, same_model: bool = False) -> None:
    """Check that adapters belong to one base model.

    Args:
        adapters: by the name to tell them by.
        same_model: that the user knows it, whatever the headers say.

    Raises:
        ValueError: the headers name different models or pipelines, the layouts or the layers' shapes differ, or there
            is no part of the model that all of them adapt.
    """
    (first, known), *others = adapters.items()
    for name, other in others:
        facts = {
            "base model": (known.model, other.model),
            "pipeline": (known.facts.get("pipeline"), other.facts.get("pipeline")),
        }
        for what, (one, two) in facts.items():
            if None not in (one, two) and one != two and not same_model:
                raise ValueError(
                    f"{first} and {name} were trained on different models, {what} {one} and {two}: mix adapters of one "
                    "base model. If both are the same, say so: --model NAME."
                )
        if known.layout != other.layout:
            raise ValueError(
                f"{first} is stored for {known.layout} and {name} for {other.layout}: save both in the same way."
            )
        if _older_names(known) & _text_names(other) or _older_names(other) & _text_names(known):
            raise ValueError(
                f"{first} and {name} name the layers of a text encoder in two ways: load one into a pipeline, and save "
                "it again."
            )
    _require_shared_part(adapters)
    require_same_shapes({name: adapter.updates for name, adapter in adapters.items()})


def _require_shared_part(adapters: Mapping[str, StoredAdapter]) -> None:
    """Refuse adapters of a denoiser and of a text encoder, say, which would not be mixed but put beside each other."""
    parts = {name: sorted({layer.split(".", 1)[0] for layer in each.updates}) for name, each in adapters.items()}
    if not set.intersection(*map(set, parts.values())):
        told = ", ".join(f"{name} is of {' and '.join(found)}" for name, found in parts.items())
        raise ValueError(
            f"There is no part of the model that all adapters change ({told}): mix adapters of the same part, or load "
            "them side by side."
        )


def _text_names(adapter: StoredAdapter) -> set[str]:
    """Layers of text encoders."""
    return {name.split(".", 1)[1] for name in adapter.updates if name.startswith("text_encoder")}


def _older_names(adapter: StoredAdapter) -> set[str]:
    """Those that have a name of transformers 4, as transformers 5 names them."""
    return {name.removeprefix("text_model.") for name in _text_names(adapter) if name.startswith("text_model.")}


def _read_file(file: Path) -> dict[str, Update]:
    """The updates of a file in diffusers' format."""
    from safetensors import safe_open

    by_part: dict[str, dict[str, Tensor]] = {}
    for name, value in _tensors(file).items():
        part, _, rest = name.partition(".")
        if part not in _PARTS:
            raise ValueError(
                f"{file} holds {name}, which is not diffusers' name: load it into a pipeline and save it with "
                "save_lora_weights first."
            )
        by_part.setdefault(part, {})[rest] = value
    with safe_open(file, framework="pt") as opened:
        header = json.loads((opened.metadata() or {}).get("lora_adapter_metadata", "{}"))
    found: dict[str, Update] = {}
    for part, tensors in by_part.items():
        settings = {key.removeprefix(f"{part}."): value for key, value in header.items() if key.startswith(f"{part}.")}
        found |= {f"{part}.{name}": update for name, update in _updates(tensors, settings, file).items()}
    return found


def _tensors(file: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file} cannot be read: {error}") from error


def _peft_settings(folder: Path) -> dict[str, Any]:
    if not (folder / _PEFT_SETTINGS).is_file():
        raise ValueError(f"{folder} holds no {_PEFT_SETTINGS} beside its {PEFT_FILE}: copy both of them.")
    settings: dict[str, Any] = json.loads((folder / _PEFT_SETTINGS).read_text(encoding="utf-8"))
    return settings


def _updates(tensors: Mapping[str, Tensor], settings: Mapping[str, Any], file: Path) -> dict[str, Update]:
    """The factors of every module, with the scale that PEFT gives them.

    Args:
        tensors: of one model.
        settings: of its `LoraConfig`; empty where the file has none, which means alpha = rank.
        file: to name in errors.
    """
    kind = settings.get("peft_type", "LORA")
    if settings.get("use_dora") or any("lora_magnitude_vector" in name for name in tensors):
        raise ValueError(f"{file} is a DoRA, whose magnitudes do not add up: mix LoRAs, or export it merged.")
    factors: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        match = _FACTORS.fullmatch(name)
        if match is None or kind != "LORA":
            raise ValueError(f"{file} holds {name} (type {kind}), which is no factor of a LoRA: only LoRAs are mixed.")
        which = match["factor"] or {"down": "A", "up": "B"}[match["older"]]
        factors.setdefault(match["module"], {})[which] = value
    for module, pair in factors.items():
        _check_factors(module, pair, file)
    return {
        module: Update(pair["A"], pair["B"], _scale(settings, module, len(pair["A"])))
        for module, pair in factors.items()
    }


def _check_factors(module: str, pair: Mapping[str, Tensor], file: Path) -> None:
    down, up = pair.get("A"), pair.get("B")
    if down is None or up is None or down.ndim < 2:
        raise ValueError(f"{file} has only one of the two factors of {module}: it is cut off, or no LoRA.")
    if up.shape[1] != len(down) or math.prod(up.shape[2:]) != 1:
        raise ValueError(
            f"{file}: the factors of {module}, {tuple(up.shape)} and {tuple(down.shape)}, are of a grouped or a "
            "two-sided convolution, which is not mixed."
        )
    if not (torch.isfinite(down).all() and torch.isfinite(up).all()):
        raise ValueError(f"{file} holds values that are not finite, in {module}: train it again.")


def _scale(settings: Mapping[str, Any], module: str, rank: int) -> float:
    """What PEFT multiplies the update of a module with."""
    if not settings:
        return 1.0
    pattern: Mapping[str, float] = settings.get("alpha_pattern") or {}
    own = next((alpha for key, alpha in pattern.items() if re.match(rf"(.*\.)?({key})$", module)), None)
    alpha = settings.get("lora_alpha", 8) if own is None else own  # PEFT's default
    return float(alpha) / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def save_mixture(mixture: Mixture, layout: Layout, folder: Path, facts: Mapping[str, Any]) -> Path:
    """Write a mixture for plain diffusers, or as PEFT folders, in fp32.

    Every layer of a part is filled up with zeros to one rank, and alpha is that rank: there is no reader, also of
    other programs, that takes a scale other than 1 from such a file.

    Args:
        mixture: of adapters of that layout.
        layout: how its members are written.
        folder: made if absent.
        facts: for the header of every file.

    Returns:
        The file of the first denoiser.
    """
    folder = Path(folder)
    header = {"format": "pt", "alignprop": json.dumps({"library": _library(), **facts}, sort_keys=True)}
    by_part: dict[str, dict[str, Update]] = {}
    for name, update in mixture.updates.items():
        part, _, module = name.partition(".")
        by_part.setdefault(part, {})[module] = update
    if layout == "peft":
        places = {part: folder if part == ONLY_DENOISER else folder / part for part in by_part}
        return [_write_peft(updates, places[part], header) for part, updates in by_part.items()][0]  # noqa: RUF015
    second = by_part.pop("transformer_2", None)
    if second is not None:
        _write_file({"transformer": second}, folder / SECOND_FILE, header)
    return _write_file(by_part, folder / DIFFUSERS_FILE, header)


def _library() -> str:
    return f"alignprop {version('alignprop')}"


def _write_file(parts: Mapping[str, Mapping[str, Update]], file: Path, header: Mapping[str, str]) -> Path:
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    settings: dict[str, Any] = {}
    for part, updates in parts.items():
        own, config = _filled(updates)
        tensors |= {f"{part}.{name}": value for name, value in own.items()}
        settings |= {f"{part}.{key}": value for key, value in config.items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, file, {**header, "lora_adapter_metadata": json.dumps(settings, indent=2, sort_keys=True)})
    return file


def _write_peft(updates: Mapping[str, Update], folder: Path, header: Mapping[str, str]) -> Path:
    from safetensors.torch import save_file

    tensors, settings = _filled(updates)
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"peft_type": "LORA", "inference_mode": True, **settings}
    (folder / _PEFT_SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    named = {f"{_PEFT_PREFIX}{name}": value for name, value in tensors.items()}
    save_file(named, folder / PEFT_FILE, dict(header))
    return folder / PEFT_FILE


def _filled(updates: Mapping[str, Update]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of one part, all of one rank, and the settings that go with them."""
    rank = max(len(update.down) for update in updates.values())
    tensors = {}
    for module, update in updates.items():
        missing = rank - len(update.down)
        rows = update.down.new_zeros(missing, *update.down.shape[1:])
        columns = update.up.new_zeros(len(update.up), missing, *update.up.shape[2:])
        tensors[f"{module}.lora_A.weight"] = torch.cat([update.down, rows]).float().contiguous()
        tensors[f"{module}.lora_B.weight"] = torch.cat([update.scale * update.up, columns], dim=1).float().contiguous()
    # Transformers 5 names no ``text_model`` in front; the end of a name fits both.
    targets = sorted(module.removeprefix("text_model.") for module in updates)
    return tensors, {"r": rank, "lora_alpha": rank, "target_modules": targets}
