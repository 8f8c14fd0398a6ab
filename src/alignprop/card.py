"""The model card beside an adapter, in the layout that model hubs read."""

import shutil
from pathlib import Path

import yaml

from alignprop.report import summarise
from alignprop.runfolder import RunFolder, write_atomically

_CARD = """---
{header}---

# Adapter `{name}`

A low-rank adapter (LoRA) of `{base}`, trained by backpropagating a reward through the sampling chain (AlignProp,
arXiv 2310.03739) with [alignprop](https://pypi.org/project/alignprop/) {version}.

**{headline}**
{warnings}
![Base and adapter, same prompts and seeds](comparison.png)

Above the base model, below the adapter, on prompts that were not trained.

## Use

```python
{code}
```

## How it was trained

```yaml
{settings}```

## Limits

The reward is a model of taste, not taste: pictures may score higher without being better, above all beyond the prompts
and the number of denoising steps used in training. The base model's limits apply, and its licence: {licence}.
"""


def write_card(run_dir: Path, code: str, version: str) -> Path:
    """Write ``adapter/README.md`` and its picture from a run folder.

    Args:
        run_dir: the run's folder, with an adapter.
        code: Python that loads the adapter.
        version: of this library.
    """
    folder = RunFolder(run_dir)
    config = yaml.safe_load(folder.config.read_text(encoding="utf-8"))
    summary = summarise(run_dir)
    base = config["model"]["name"]
    licence = licence_of(base)
    header = {
        "base_model": base,
        "library_name": "diffusers",
        **licence,
        "tags": ["lora", "alignprop", "text-to-image"],
    }
    text = _CARD.format(
        header=yaml.safe_dump(header, sort_keys=False),
        name=run_dir.name,
        base=base,
        version=version,
        headline=summary.headline,
        warnings="".join(f"\n> {warning}\n" for warning in summary.warnings),
        code=code,
        licence=", ".join(licence.values()) or "see its card",
        settings=yaml.safe_dump(config, sort_keys=False),
    )
    _write_comparison(folder, summary.kept_step)
    write_atomically(folder.adapter / "README.md", text)
    return folder.adapter / "README.md"


def licence_of(base: str) -> dict[str, str]:
    """What the base model's own card says of its licence, as the fields of a card's header; nothing is downloaded.

    Args:
        base: as ``model.name``: a folder, the name of a model on the hub, or ``emoji``.
    """
    from huggingface_hub import metadata_load, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    if base == "emoji":
        return {"license": "apache-2.0"}
    card: object = Path(base).expanduser() / "README.md"
    if not Path(base).expanduser().exists():
        try:
            card = try_to_load_from_cache(base, "README.md")
        except HFValidationError:  # no name on the hub
            return {}
    if not isinstance(card, str | Path) or not Path(card).is_file():
        return {}
    try:
        header = metadata_load(card) or {}
    except (ValueError, yaml.YAMLError):  # no card that a hub would read
        return {}
    return {name: str(header[name]) for name in ("license", "license_name", "license_link") if header.get(name)}


def _write_comparison(folder: RunFolder, kept_step: int | None) -> None:
    """The grids of the base model and of the kept adapter, one above the other."""
    from PIL import Image

    grids = [folder.samples(step) / "unseen.png" for step in (0, kept_step or 0)]
    if not all(path.exists() for path in grids):
        return
    before, after = (Image.open(path).convert("RGB") for path in grids)
    both = Image.new("RGB", (before.width, before.height + after.height), "white")
    both.paste(before, (0, 0))
    both.paste(after, (0, before.height))
    partial = folder.adapter / "comparison.partial.png"
    both.save(partial)
    shutil.move(partial, folder.adapter / "comparison.png")
