"""Published checkpoints of rewards, from a folder or the hub: no pickle is executed, no weight is left random."""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PINNED = {
    "google/owlv2-base-patch16-ensemble": "cfd3195ba4ea9592eec887ded089f4c08eff231d",
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K": "1c2b8495b28150b8a4922ee1c8edee224c284c0c",
    "openai/clip-vit-large-patch14": "32bd64288804d66eefd0ccbe215aa642df71cc41",
    "trl-lib/ddpo-aesthetic-predictor": "cf4bd10345610935a80a5d3be9a3133c50f121e4",
    "xswu/HPSv2": "697403c78157020a1ae59d23f111aa58ced35b0a",
    "yuvalkirstain/PickScore_v1": "a4e4367c6dfa7288a00c550414478f865b875800",
    "zai-org/ImageReward": "5736be03b2652728fb87788c9797b0570450ab72",
}
"""Commits at which repositories of the hub are read where no other revision is asked for."""

_shared: ContextVar[dict[Any, Any] | None] = ContextVar("shared", default=None)


@contextmanager
def shared_models() -> Iterator[None]:
    """Inside the context `load_model` gives one object for one checkpoint: rewards then share its weights."""
    token = _shared.set({})
    try:
        yield
    finally:
        _shared.reset(token)


def load_model(auto_class: Any, model: str, revision: str | None, kind: str, setting: str = "model") -> Any:
    """Load a transformers model in float32, frozen and in evaluation mode.

    Args:
        auto_class: Has `from_pretrained`.
        model: A folder or an id of the hub.
        revision: Commit, tag or branch on the hub; None for that of `PINNED`, if any, or the newest.
        kind: What the checkpoint should be, for the messages.
        setting: The argument that names it, for the messages.

    Raises:
        ValueError: There is no such checkpoint, it is of another kind, or some of its weights are missing.
    """
    shared, key = _shared.get(), (auto_class, model, revision)
    if shared is not None and key in shared:
        return shared[key]
    with explained(model, kind, setting):
        loaded, info = auto_class.from_pretrained(
            model, revision=_pinned(model, revision), dtype=torch.float32, output_loading_info=True
        )
    missing = sorted(info["missing_keys"])
    if missing:
        raise ValueError(
            f"{setting}={model!r} is no {kind}: it lacks {len(missing)} weights such as {missing[0]!r}; "
            "give a checkpoint that was trained as one."
        )
    loaded.eval().requires_grad_(False)
    if shared is not None:
        shared[key] = loaded
    return loaded


def load_part(
    auto_class: Any, model: str, revision: str | None, kind: str, setting: str = "model", **arguments: Any
) -> Any:
    """Load what belongs to a model and has no weights: its configuration, tokenizer or image processor.

    Raises:
        ValueError: As `load_model`.
    """
    with explained(model, kind, setting):
        return auto_class.from_pretrained(model, revision=_pinned(model, revision), **arguments)


def load_tensors(model: str, filename: str, revision: str | None, kind: str) -> dict[str, Tensor]:
    """Load a file of weights as it was published, without executing what a pickle may hold.

    Args:
        model: A folder, a file, or an id of the hub.
        filename: Of the weights within the folder or the hub's repository.
        revision: Commit, tag or branch on the hub; None for that of `PINNED`, if any, or the newest.
        kind: What the checkpoint should be, for the messages.

    Raises:
        ValueError: There is no such file, or it holds something else than tensors.
    """
    with explained(model, kind):
        path = _local_file(model, filename, _pinned(model, revision))
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    if isinstance(loaded, dict):
        loaded = loaded.get("state_dict", loaded)  # some are published with the state of their training
    if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise ValueError(f"model={model!r} is no {kind}: {path.name} is no dictionary of tensors; give one.")
    return loaded


def check_layout(tensors: Mapping[str, Tensor], layout: Mapping[str, Sequence[int]], model: str, kind: str) -> None:
    """Refuse weights that do not have exactly the names and shapes of `layout`.

    Args:
        tensors: The weights by name.
        layout: Their shapes by name.
        model: Where they are from, for the message.
        kind: What they should be, for the message.

    Raises:
        ValueError: A weight lacks, is left over or has another shape.
    """
    problems = {
        "lacks": sorted(layout.keys() - tensors.keys()),
        "has, beyond its own,": sorted(tensors.keys() - layout.keys()),
        "has in other shapes": [n for n in layout if n in tensors and tuple(tensors[n].shape) != tuple(layout[n])],
    }
    found = [f"{verb} {len(names)} weights such as {names[0]!r}" for verb, names in problems.items() if names]
    if found:
        raise ValueError(f"model={model!r} is no {kind}: it {', '.join(found)}; give the published checkpoint.")


def check_vocabulary(tokenizer: Any, known: int, source: str, setting: str = "model", spare: int = 0) -> None:
    """Refuse a tokenizer of another model.

    Where its files are missing, transformers builds one that knows no word: every prompt would be the same.

    Args:
        tokenizer: Of transformers.
        known: How many tokens the model has embeddings for.
        source: Where the tokenizer is from, for the message.
        setting: The argument that names it, for the message.
        spare: Tokens of the model that the tokenizer need not have.

    Raises:
        ValueError: It has more or fewer tokens.
    """
    if not known - spare <= len(tokenizer) <= known:
        raise ValueError(
            f"{setting}={source!r} has a tokenizer of {len(tokenizer)} tokens, where the model knows {known}; "
            "give a folder or an id of the hub that holds the model's own tokenizer."
        )


@contextmanager
def explained(model: str, kind: str, setting: str = "model") -> Iterator[None]:
    """Turn what loading raises into one sentence."""
    from safetensors import SafetensorError

    if _is_path(model) and not Path(model).expanduser().exists():
        raise ValueError(f"{setting}={model!r} does not exist; give the folder of a {kind}, or its id on the hub.")
    try:
        yield
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{setting}={model!r} holds a pickle of more than tensors, which is not opened because it could execute "
            "anything; convert it to safetensors."
        ) from error
    except OSError as error:
        raise ValueError(
            f"{setting}={model!r} could not be loaded as {kind} ({_first_sentence(error)}); check its name and "
            "revision, and the network, or give a folder that holds it."
        ) from error
    except (ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ValueError(
            f"{setting}={model!r} is no {kind} ({_first_sentence(error)}); give a checkpoint that is one."
        ) from error


def _pinned(model: str, revision: str | None) -> str | None:
    return revision or PINNED.get(model)


def _local_file(model: str, filename: str, revision: str | None) -> Path:
    path = Path(model).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        return path / filename
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(model, filename, revision=revision))


def _is_path(model: str) -> bool:
    """Whether a name cannot be an id of the hub, which is `name` or `owner/name`."""
    return model.startswith((".", "/", "~", "\\")) or model.count("/") > 1 or Path(model).is_absolute()


def _first_sentence(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].split(". ")[0].rstrip(".:")
