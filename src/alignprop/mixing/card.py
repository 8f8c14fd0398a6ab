"""The model card beside a mixture, in the layout that model hubs read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from alignprop.card import licence_of
from alignprop.runfolder import write_atomically

_CARD = """---
{header}---

# Mixture `{name}`

A mixture of low-rank adapters (LoRA){of_base}, made by `alignprop mix`. Nothing was trained for it.

| member | {columns} | adapter |
|---|{rules}---|
{rows}

{recipe}
{use}
## Limits

Updates mix in a line; pictures and rewards need not. The limits and licences of the members and of the base model
apply{licence}.
"""


def write_card(
    folder: Path, model: str | None, members: Mapping[str, Mapping[str, Any]], recipe: str, code: str | None
) -> Path:
    """Write ``README.md`` beside a mixture.

    Args:
        folder: of the mixture.
        model: the base model's name, where it is known.
        members: by name: the values of the table's columns, the last one the adapter's folder.
        recipe: what the weights mean, in a paragraph.
        code: Python that draws with it, where that is known.
    """
    licence = licence_of(model) if model is not None else {}
    header = {
        **({"base_model": model} if model is not None else {}),
        "library_name": "diffusers",
        **licence,
        "tags": ["lora", "alignprop", "mixture", "text-to-image"],
    }
    *columns, _ = next(iter(members.values()))
    text = _CARD.format(
        header=yaml.safe_dump(header, sort_keys=False),
        name=folder.resolve().name,
        of_base=f" of `{model}`" if model is not None else "",
        columns=" | ".join(columns),
        rules="---|" * len(columns),
        rows="\n".join(f"| {name} | {' | '.join(map(str, row.values()))} |" for name, row in members.items()),
        recipe=recipe,
        use=f"\n## Use\n\n```python\n{code}\n```\n" if code else "",
        licence=f": {', '.join(licence.values())}" if licence else "",
    )
    write_atomically(folder / "README.md", text)
    return folder / "README.md"
