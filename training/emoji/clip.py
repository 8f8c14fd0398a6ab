"""Stage `clip`: trains the small CLIP of the rewards on captions with and without style and on degraded pictures.

A caption without a style fits the drawings of its concept in every style, so a batch has several positives for a
caption and the targets are spread over them. A degraded picture fits only captions that name its damage, so that the
features see quality.
"""

from __future__ import annotations

import argparse
import math
from typing import NamedTuple

import augment
import numpy as np
import torch
import torch.nn.functional as F
from checkpoint import Checkpoint
from concepts import CONCEPTS, STYLES, Concept, caption
from data import BUILD, SIZE, load_images
from diffusers import AutoencoderKL
from schedule import warm_up_and_decay
from text import load_tokenizer, text_config, tokenize
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig

from alignprop.emoji import aesthetic_features

SEED = 23
CONCEPTS_A_BATCH, PICTURES_A_CONCEPT = 32, 2
LEARNING_RATE = 1.2e-3
PLAIN_SHARE = 0.35
DEGRADED_SHARE = 0.3
DRAWN_SHARE = 0.8
"""Share of the concepts of a batch that the text-to-image model draws."""

FINE_RATE = 0.6
"""Learning rate of `--fine`, as a share of the full one."""

FINE_DRAWN_SHARE = 0.5
"""The share in `--fine`, which teaches style and damage on things of all kinds."""

PROJECTION, WIDTH = 128, 192
NAMES_WEIGHT = 0.5
IGNORED = -100

DAMAGES = ("blurry", "noisy", "too colourful", "distorted")
SMEARED = 3
"""Index of the damage that decoded, disturbed latents have, besides shuffled and blended pictures."""

DISTURBED_SHARE = 0.7


def grid_waves(side: int, width: int) -> Tensor:
    """Sines and cosines (side * side, width) of the row and the column of every patch, of deviation about 0.35.

    The default start of the position embedding is so small beside the patches that the CLIP learns a bag of them.
    """
    frequencies = 10.0 ** -torch.linspace(0, 1, width // 4)
    angles = torch.arange(side)[:, None] * frequencies
    waves = 0.5 * torch.cat((angles.sin(), angles.cos()), 1)
    rows, columns = waves[:, None].expand(-1, side, -1), waves[None].expand(side, -1, -1)
    return torch.cat((rows, columns), 2).flatten(0, 1)


def make_clip() -> CLIPModel:
    """The untrained CLIP: text 3 x 192, vision 4 x 192 on 8 px patches, projections of 128."""
    vision = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=SIZE,
        patch_size=8,
        projection_dim=PROJECTION,
    )
    return CLIPModel(
        CLIPConfig(text_config=text_config().to_dict(), vision_config=vision.to_dict(), projection_dim=PROJECTION)
    )


def damage(images: Tensor, kind: int, generator: torch.Generator) -> Tensor:
    """Degrade pictures in [0, 1] as the damage of that index says, more or less strongly."""
    strength = torch.rand((), generator=generator).item()
    if kind == 0:
        return augment.blurred(images, 1.5 + 3 * strength)
    if kind == 1:
        return augment.noisy(images, 0.12 + 0.4 * strength, generator)
    if kind == 2:
        return augment.contrasted(augment.saturated(images, 2.5 + 3 * strength), 1 + strength)
    shuffled = augment.shuffled_patches(images, 4, generator)
    return shuffled if strength < 0.5 else augment.blended(images, generator)


class Batch(NamedTuple):
    """What one step learns from.

    Attributes:
        images: (B, 3, 64, 64) in [0, 1].
        tokens: (B, 24) token ids of the captions.
        fits: (B, B), which picture fits which caption.
        concepts: (B,) indices of concepts, `IGNORED` where the picture is degraded.
        styles: (B,) indices of styles, likewise.
        damages: (B,) 0 for none, else one more than the index in `DAMAGES`.
    """

    images: Tensor
    tokens: Tensor
    fits: Tensor
    concepts: Tensor
    styles: Tensor
    damages: Tensor


class Names(nn.Module):
    """Linear classifiers that only training has: they pull concept, style and damage into the features.

    Style and damage are read from what the aesthetic head reads.
    """

    def __init__(self, num_concepts: int) -> None:
        super().__init__()
        self.concept = nn.Linear(PROJECTION, num_concepts)
        self.style = nn.Linear(PROJECTION + 4 * WIDTH, len(STYLES))
        self.damage = nn.Linear(PROJECTION + 4 * WIDTH, 1 + len(DAMAGES))

    def forward(self, embedding: Tensor, features: Tensor, batch: Batch) -> Tensor:
        """Cross entropy of the three names."""
        by_concept = F.cross_entropy(self.concept(embedding), batch.concepts, ignore_index=IGNORED)
        by_style = F.cross_entropy(self.style(features), batch.styles, ignore_index=IGNORED)
        return by_concept + by_style + F.cross_entropy(self.damage(features), batch.damages)


class Batches:
    """Draws pictures with captions and says which fit which."""

    def __init__(self, generator: torch.Generator, drawn_share: float = DRAWN_SHARE) -> None:
        data = np.load(BUILD / "data.npz")
        self._generator, self._drawn_share = generator, drawn_share
        self._vae = AutoencoderKL.from_pretrained(BUILD / "vae").eval().requires_grad_(False)
        self._sets = [(load_images() + 1) / 2]
        if (BUILD / "round_trips.pt").exists():
            self._sets.append(torch.load(BUILD / "round_trips.pt").float().div(255))
        self._style = torch.from_numpy(data["style"])
        self._concepts = [Concept(str(name), "", "") for name in data["names"]]
        concept = torch.from_numpy(data["concept"])
        self._rows = [torch.nonzero(concept == index).flatten() for index in range(len(self._concepts))]

    def _rand(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self._generator)

    def _choose_concepts(self) -> Tensor:
        drawn = round(self._drawn_share * CONCEPTS_A_BATCH)
        first = torch.randperm(len(CONCEPTS), generator=self._generator)[:drawn]
        others = torch.randperm(len(self._concepts) - len(CONCEPTS), generator=self._generator)
        chosen = torch.cat((first, len(CONCEPTS) + others[: CONCEPTS_A_BATCH - drawn]))
        return chosen.repeat_interleave(PICTURES_A_CONCEPT)

    def _pictures(self, rows: Tensor) -> Tensor:
        pick = torch.randint(len(self._sets), (len(rows),), generator=self._generator)
        images = torch.stack([self._sets[k][row] for k, row in zip(pick.tolist(), rows.tolist(), strict=True)])
        images = augment.moved(images, self._generator, degrees=10, scale=0.12, shift=0.1)
        images = augment.tinted(images, 0.06, self._generator)
        if self._rand() < 0.3:
            images = augment.blurred(images, 0.3 + 0.3 * self._rand().item())
        return augment.noisy(images, 0.03 * self._rand(len(rows), 1, 1, 1), self._generator)

    @property
    def num_concepts(self) -> int:
        """How many concepts there are."""
        return len(self._concepts)

    def draw(self) -> Batch:
        """Pictures of a few concepts, a third of them degraded, with captions."""
        concept = self._choose_concepts()
        count = len(concept)
        rows = torch.stack([self._rows[c][int(self._rand() * len(self._rows[c]))] for c in concept.tolist()])
        images, style = self._pictures(rows), self._style[rows]
        plain = self._rand(count) < PLAIN_SHARE
        kind = torch.where(self._rand(count) < DEGRADED_SHARE, (self._rand(count) * len(DAMAGES)).long(), -1)
        for index in range(len(DAMAGES)):
            chosen = kind == index
            if chosen.any():
                images[chosen] = self._damaged(images[chosen], index)
        captions = []
        for c, s, p, k in zip(concept.tolist(), style.tolist(), plain.tolist(), kind.tolist(), strict=True):
            words = caption(self._concepts[c], None if p else STYLES[s])
            captions.append(words if k < 0 else f"{words}, {DAMAGES[k]}")
        fits = (concept[:, None] == concept) & (plain | (style[:, None] == style)) & (kind[:, None] == kind)
        named, styled = concept.where(kind < 0, IGNORED), style.where(kind < 0, IGNORED)
        return Batch(images, tokenize(captions), fits, named, styled, kind + 1)

    def _damaged(self, images: Tensor, kind: int) -> Tensor:
        if kind != SMEARED or self._rand() > DISTURBED_SHARE:
            return damage(images, kind, self._generator)
        return augment.smeared(self._vae, images, 0.3 + 0.7 * self._rand().item(), self._generator)


def normalised(images: Tensor) -> Tensor:
    """Pictures in [0, 1] to the range of the CLIP, [-1, 1]."""
    return 2 * images - 1


def loss_of(model: CLIPModel, names: Names, batch: Batch) -> Tensor:
    """Cross entropy in both directions, the target spread over all that fits, and that of the names."""
    length = int((batch.tokens == load_tokenizer().eos_token_id).int().argmax(1).max()) + 1
    with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):  # faster than flash on a CPU
        features = aesthetic_features(model, batch.images).float()
        text = model.text_projection(model.text_model(batch.tokens[:, :length]).pooler_output)
    embedding, text = features[:, :PROJECTION], F.normalize(text.float(), dim=1)
    logits, target = model.logit_scale.exp() * embedding @ text.T, batch.fits.float()
    by_image = F.cross_entropy(logits, target / target.sum(1, keepdim=True))
    by_text = F.cross_entropy(logits.T, (target / target.sum(0)).T)
    named = names(embedding, features, batch)
    return (by_image + by_text) / 2 + NAMES_WEIGHT * named


def train(steps: int, *, fine: bool = False) -> CLIPModel:
    """Train, from the last checkpoint if there is one.

    Args:
        steps: Of the whole training.
        fine: Go on from the finished training with more things, at a lower rate, in `clip-fine.pt`.
    """
    torch.manual_seed(SEED + fine)
    model = make_clip()
    if fine:
        model.load_state_dict(torch.load(BUILD / "clip.pt")["model"])
    generator = torch.Generator().manual_seed(SEED + fine)
    batches = Batches(generator, FINE_DRAWN_SHARE if fine else DRAWN_SHARE)
    names = Names(batches.num_concepts)
    parameters = [*model.parameters(), *names.parameters()]
    rate = (FINE_RATE if fine else 1.0) * LEARNING_RATE
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.05, betas=(0.9, 0.98))
    schedule = warm_up_and_decay(optimizer, steps, warm_up=50)
    parts = {"model": model, "names": names, "optimizer": optimizer, "schedule": schedule}
    checkpoint = Checkpoint(BUILD / ("clip-fine.pt" if fine else "clip.pt"), parts, generator)
    for step in checkpoint.steps(steps):
        loss = loss_of(model, names, batches.draw())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(100))
        checkpoint.log(step, loss)
    return model.eval()


@torch.no_grad()
def retrieval(model: CLIPModel, images: Tensor, concepts: Tensor, styles: Tensor) -> dict[str, float]:
    """Share of pictures in [0, 1] whose best caption names the concept (plain) and concept and style (styled)."""
    features = F.normalize(model.get_image_features(pixel_values=normalised(images)).pooler_output, dim=1)
    plain = [concept.caption for concept in CONCEPTS]
    styled = [caption(concept, style) for concept in CONCEPTS for style in STYLES]
    best = {}
    for name, captions in {"plain": plain, "styled": styled}.items():
        text = F.normalize(model.get_text_features(tokenize(captions)).pooler_output, dim=1)
        best[name] = (features @ text.T).argmax(1)
    return {
        "plain": (best["plain"] == concepts).float().mean().item(),
        "styled": (best["styled"] == len(STYLES) * concepts + styles).float().mean().item(),
    }


def main() -> None:
    """Train the CLIP, save it to `build/clip` and print its retrieval on the real drawings."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=2600)
    parser.add_argument("--fine", action="store_true", help="go on from clip.pt, for --steps, with more things")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model = train(arguments.steps, fine=arguments.fine)
    model.save_pretrained(BUILD / "clip")
    load_tokenizer().save_pretrained(BUILD / "clip")
    data = np.load(BUILD / "data.npz")
    rows = torch.from_numpy(data["concept"]) < len(CONCEPTS)
    images = (load_images()[rows] + 1) / 2
    print(retrieval(model, images, torch.from_numpy(data["concept"])[rows], torch.from_numpy(data["style"])[rows]))


if __name__ == "__main__":
    main()
