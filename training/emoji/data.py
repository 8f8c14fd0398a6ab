"""Stage `data`: joins three emoji packages by code point into one array of 64 px pictures on white.

Writes `build/data.npz` with `images` (N, 64, 64, 3) uint8, `concept` (N,), `style` (N,), and the tables `names`,
`codes`, `slugs`. The first `len(CONCEPTS)` concepts are those of `concepts.py`; the others serve the VAE, the CLIP
and the judge only.
"""

from __future__ import annotations

import io
import json
import re
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import resvg_py
import torch
from concepts import CONCEPTS, STYLES, Concept
from PIL import Image

BUILD = Path(__file__).parent / "build"
SIZE = 64
PACKAGES = {
    "3d": "@lobehub/fluent-emoji-3d@1.1.0",
    "noto": "emoji-datasource-google@16.0.0",
    "fluent": "fluentui-emoji@1.3.0",
}
CATEGORIES = {"Animals & Nature", "Food & Drink", "Travel & Places", "Objects", "Activities"}
SKIPPED_SUBCATEGORIES = {"time"}


def fetch(package: str) -> Path:
    """Download and unpack an npm package into the build folder, unless it is there.

    Returns:
        The folder of its files.
    """
    folder = BUILD / "npm" / re.sub(r"[@/]+", "-", package).strip("-")
    if not (folder / "package").exists():
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run(["npm", "pack", package], cwd=folder, check=True, stdout=subprocess.DEVNULL)
        (archive,) = folder.glob("*.tgz")
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
        archive.unlink()
    return folder / "package"


def on_white(image: Image.Image) -> np.ndarray:
    """Shrink an RGBA picture to 64 px on white."""
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    picture = Image.alpha_composite(white, image).convert("RGB")
    return np.asarray(picture.resize((SIZE, SIZE), Image.Resampling.LANCZOS))


def render_svg(path: Path) -> np.ndarray:
    """Render a drawing at four times the size, then shrink it."""
    png = bytes(resvg_py.svg_to_bytes(svg_string=path.read_text(), width=4 * SIZE, height=4 * SIZE))
    return on_white(Image.open(io.BytesIO(png)))


class Sources:
    """The unpacked packages."""

    def __init__(self) -> None:
        folders = {key: fetch(package) for key, package in PACKAGES.items()}
        self._fluent = folders["fluent"] / "icons"
        self._3d = folders["3d"] / "assets"
        self._noto = folders["noto"] / "img" / "google" / "64"
        self.entries = json.loads((folders["noto"] / "emoji.json").read_text())

    def draw(self, concept: Concept, style: str) -> np.ndarray | None:
        """The picture of a concept in a style, or None where the package has none."""
        path = {
            "3d": self._3d / f"{concept.code}.webp",
            "flat": self._fluent / "flat" / f"{concept.slug}.svg",
            "noto": self._noto / f"{concept.code}.png",
            "line": self._fluent / "high-contrast" / f"{concept.slug}.svg",
        }[style]
        if not path.exists():
            return None
        return render_svg(path) if path.suffix == ".svg" else on_white(Image.open(path))

    def slug_of(self, entry: dict) -> str | None:
        """The Fluent file of a Noto entry, found by its names."""
        names = [entry["name"], *entry["short_names"]]
        slugs = [re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") for name in names]
        return next((slug for slug in slugs if (self._fluent / "flat" / f"{slug}.svg").exists()), None)


def joined(sources: Sources) -> list[Concept]:
    """The concepts of `concepts.py`, then every other object that the packages share."""
    concepts = list(CONCEPTS)
    codes = {concept.code for concept in concepts}
    names = {concept.name for concept in concepts}
    slugs = {concept.slug for concept in concepts}
    for entry in sorted(sources.entries, key=lambda entry: entry["sort_order"]):
        code, slug = entry["unified"].lower(), sources.slug_of(entry)
        if entry["category"] not in CATEGORIES or entry["subcategory"] in SKIPPED_SUBCATEGORIES:
            continue
        if slug is None or code in codes or slug in slugs:
            continue
        name = slug.replace("-", " ")
        concepts.append(Concept(f"{name} body" if name in names else name, code, slug))
        slugs.add(slug)
    return concepts


def load_images() -> torch.Tensor:
    """All pictures of the data set, (N, 3, 64, 64) in [-1, 1]."""
    images = torch.from_numpy(np.load(BUILD / "data.npz")["images"])
    return images.permute(0, 3, 1, 2).float().div(127.5).sub(1).contiguous()


def build() -> None:
    """Write the data set."""
    sources = Sources()
    images, concept_ids, style_ids = [], [], []
    concepts = joined(sources)
    for index, concept in enumerate(concepts):
        for style_index, style in enumerate(STYLES):
            image = sources.draw(concept, style)
            if image is None:
                if index < len(CONCEPTS):
                    print(f"missing: {concept.name} in style {style}")
                continue
            images.append(image)
            concept_ids.append(index)
            style_ids.append(style_index)
    BUILD.mkdir(exist_ok=True)
    np.savez(
        BUILD / "data.npz",
        images=np.stack(images),
        concept=np.array(concept_ids),
        style=np.array(style_ids),
        names=np.array([concept.name for concept in concepts]),
        codes=np.array([concept.code for concept in concepts]),
        slugs=np.array([concept.slug for concept in concepts]),
    )
    print(f"{len(images)} pictures of {len(concepts)} concepts, {len(CONCEPTS)} of them to draw")


if __name__ == "__main__":
    build()
