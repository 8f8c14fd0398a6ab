"""The members of a mixture as the command line names them, and a mixture written with its recipe and its card."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignprop.drawing import adapter_folder, settings_of
from alignprop.terminal import loading_code

if TYPE_CHECKING:
    from alignprop.mixing import Mixture, StoredAdapter


def read_members(adapters: Sequence[Path], model: str | None) -> dict[str, StoredAdapter]:
    """The adapters by names that tell them apart, checked to be of one model."""
    from alignprop.mixing.files import read_adapter, require_alike

    stored = [read_adapter(adapter_folder(adapter)) for adapter in adapters]
    members = dict(zip(_names([adapter.folder for adapter in stored]), stored, strict=True))
    require_alike(members, same_model=model is not None)
    return members


def _names(folders: Sequence[Path]) -> list[str]:
    """The runs' names, with as many of the folders above as tell them apart.

    Raises:
        ConfigError: one is given twice.
    """
    from alignprop.config import ConfigError

    paths = [folder.resolve() for folder in folders]
    if len(set(paths)) < len(paths):
        raise ConfigError(["An adapter is given twice: give it once, with the sum of its weights."])
    parts = [(path.parent if path.name == "adapter" else path).parts for path in paths]
    depth = 1
    while len({part[-depth:] for part in parts}) < len(parts):
        depth += 1
    return ["/".join(part[-depth:]) for part in parts]


def write_mixture(
    members: dict[str, StoredAdapter],
    weights: Sequence[float],
    rank: int | None,
    output: Path,
    adapters: Sequence[Path],
    model: str | None,
) -> Mixture:
    """Mix, and write the adapter with its recipe in the header and its card.

    Args:
        members: by name.
        weights: of them, in order.
        rank: to compress to; None for the exact sum.
        output: the mixture's folder.
        adapters: what the user called the members, where their settings are.
        model: the base model, where the user says which it is.
    """
    from alignprop.mixing import Member, save_mixture
    from alignprop.mixing import mix as mixed
    from alignprop.mixing.measuring import mixture_settings

    mixture = mixed(
        [Member(name, member.updates, weight) for (name, member), weight in zip(members.items(), weights, strict=True)],
        rank,
    )
    first = next(iter(members.values()))
    recipe = {
        "members": [
            {"name": name, "folder": str(member.folder), "weight": weight}
            for (name, member), weight in zip(members.items(), weights, strict=True)
        ],
        "rank": mixture.rank,
        "compressed_to": rank,
        "relative_error": mixture.error,
    }
    config = mixture_settings({name: settings_of(path) for name, path in zip(members, adapters, strict=True)})
    facts = {
        **({"pipeline": first.facts["pipeline"]} if "pipeline" in first.facts else {}),
        **({"config": config} if config is not None else {}),
        "mixture": recipe,
    }
    save_mixture(mixture, first.layout, output, facts)
    rows = {
        name: {"weight": f"{weight:g}", "adapter": f"`{member.folder}`"}
        for (name, member), weight in zip(members.items(), weights, strict=True)
    }
    share = f"The base model's share is {mixture.base_weight:.4g}. The updates of every layer are added up, each times "
    write_card(output, model or first.model, rows, f"{share}its weight: {quality(mixture)}.", adapters[0])
    return mixture


def quality(mixture: Mixture) -> str:
    """In words, whether a mixture is exact, or how far off it is."""
    if not mixture.errors:
        return f"rank {mixture.rank}, exact"
    worst = mixture.worst or ""
    return (
        f"compressed to rank {mixture.rank}: relative error {100 * mixture.error:.3g} % of the update, "
        f"at most {100 * mixture.errors[worst]:.3g} % of a layer's ({worst})"
    )


def write_card(
    output: Path, model: str | None, rows: dict[str, Any], recipe: str, first: Path, *, by_steps: bool = False
) -> None:
    """Write the card of a mixture.

    Args:
        output: the mixture's folder.
        model: the base model's name, where it is known.
        rows: of its table, by member.
        recipe: what the weights mean.
        first: what the user called the first member, whose settings the code draws with.
        by_steps: whether the weights change with the denoising step.
    """
    from alignprop.mixing import card

    config, code = settings_of(first), None
    if config is not None:
        code = textwrap.dedent(loading_code(config, output, Path(output.name)))
        if by_steps:
            code = code.replace("import load_adapter\nload_adapter(", "import load_mixture\narguments = load_mixture(")
            code = code.replace("from alignprop import load_mixture", "from alignprop.mixing import load_mixture")
            code = code.replace(").images[0]", ", **arguments).images[0]")
    card.write_card(output, model, rows, recipe, code)
