"""Stage `latents`: encodes a few moved copies of every picture once, so that no training loop runs the encoder.

Also writes the pictures' round trips through the autoencoder, which the CLIP and the head train on.
"""

from __future__ import annotations

import augment
import numpy as np
import torch
from concepts import SHEET
from data import BUILD, load_images
from diffusers import AutoencoderKL

SEED = 31
VARIANTS = 8


@torch.no_grad()
def write_latents(vae: AutoencoderKL) -> None:
    """Write `build/latents.pt`: latents (VARIANTS, N, 4, 16, 16) of the drawn concepts; the first are unmoved."""
    drawn = torch.from_numpy(np.load(BUILD / "data.npz")["concept"]) < len(SHEET)
    images = load_images()[drawn]
    generator = torch.Generator().manual_seed(SEED)
    variants = []
    for variant in range(VARIANTS):
        batch = images if variant == 0 else moved_a_little(images, generator)
        variants.append(torch.cat([vae.encode(part).latent_dist.mean for part in batch.split(100)]))
    torch.save(torch.stack(variants), BUILD / "latents.pt")


def moved_a_little(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Turn, scale and shift pictures in [-1, 1] slightly; a flip would double what is to be learnt."""
    return 2 * augment.moved((images + 1) / 2, generator, degrees=2, scale=0.03, shift=0.03, flip=False) - 1


@torch.no_grad()
def write_round_trips(vae: AutoencoderKL) -> None:
    """Write `build/round_trips.pt`: every picture of the data set decoded again, uint8."""
    parts = [vae.decode(vae.encode(part).latent_dist.sample()).sample for part in load_images().split(100)]
    torch.save(torch.cat(parts).add(1).mul(127.5).round().clamp(0, 255).byte(), BUILD / "round_trips.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    autoencoder = AutoencoderKL.from_pretrained(BUILD / "vae").eval()
    write_latents(autoencoder)
    write_round_trips(autoencoder)
