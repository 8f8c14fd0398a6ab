"""Stage `vae`: trains the autoencoder, 64 px pictures to 16x16x4 latents of zero mean and unit deviation.

`python vae.py` trains all of it; `python vae.py --decoder-only` continues with the encoder frozen, so that latents
that were computed before stay valid.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from checkpoint import Checkpoint
from data import BUILD, load_images
from diffusers import AutoencoderKL
from schedule import warm_up_and_decay

SEED = 11
BATCH = 16
LEARNING_RATE = 2e-3
DECODER_LEARNING_RATE = 6e-4
KL_WEIGHT = 1e-3


def make_vae() -> AutoencoderKL:
    """The untrained autoencoder."""
    return AutoencoderKL(
        block_out_channels=(16, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=64,
        scaling_factor=1.0,
        mid_block_add_attention=False,
    )


def chroma(images: torch.Tensor) -> torch.Tensor:
    """Two colour differences on 4x4 means: red-green and blue-yellow."""
    red, green, blue = F.avg_pool2d(images, 4).unbind(1)
    return torch.stack((red - green, blue - (red + green) / 2), 1)


def gradients(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Differences of neighbouring pixels along both axes."""
    return images[..., 1:, :] - images[..., :-1, :], images[..., 1:] - images[..., :-1]


def reconstruction_loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """L1 + gradient L1 + squared error + chroma L1: without the last, red turns brown."""
    edges = sum(F.l1_loss(a, b) for a, b in zip(gradients(output), gradients(target), strict=True))
    return F.l1_loss(output, target) + edges + F.mse_loss(output, target) + F.l1_loss(chroma(output), chroma(target))


def augment(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Flip, shift by up to 4 px and permute the colours of a few pictures; pictures are white at the border."""
    flip = torch.rand(len(images), generator=generator) < 0.5
    images = torch.where(flip[:, None, None, None], images.flip(-1), images)
    shift = torch.randint(-4, 5, (2,), generator=generator).tolist()
    images = F.pad(images, (4, 4, 4, 4), value=1.0)[..., 4 + shift[0] : 68 + shift[0], 4 + shift[1] : 68 + shift[1]]
    permuted = images[:, torch.randperm(3, generator=generator)]
    permute = torch.rand(len(images), generator=generator) < 0.15
    return torch.where(permute[:, None, None, None], permuted, images)


def train(steps: int, decoder_only: bool) -> AutoencoderKL:
    """Train, from the last checkpoint if there is one.

    Args:
        steps: Length of the whole schedule.
        decoder_only: Freeze the encoder and start from the finished autoencoder.
    """
    torch.manual_seed(SEED)
    images = load_images()
    vae = make_vae()
    if decoder_only:
        vae = AutoencoderKL.from_pretrained(BUILD / "vae")
        vae.encoder.requires_grad_(False)
        vae.quant_conv.requires_grad_(False)
    parameters = [parameter for parameter in vae.parameters() if parameter.requires_grad]
    rate = DECODER_LEARNING_RATE if decoder_only else LEARNING_RATE
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=1e-4, betas=(0.9, 0.98))
    schedule = warm_up_and_decay(optimizer, steps, warm_up=100)
    generator = torch.Generator().manual_seed(SEED)
    checkpoint = Checkpoint(
        BUILD / ("decoder.pt" if decoder_only else "vae.pt"),
        {"vae": vae, "optimizer": optimizer, "schedule": schedule},
        generator,
    )
    for step in checkpoint.steps(steps):
        batch = augment(images[torch.randint(len(images), (BATCH,), generator=generator)], generator)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(batch).latent_dist
            noise = torch.randn(posterior.mean.shape, generator=generator)
            output = vae.decode(posterior.mean + 0.5 * posterior.std * noise).sample
        loss = reconstruction_loss(output.float(), batch)
        if not decoder_only:
            loss = loss + KL_WEIGHT * posterior.kl().mean() / posterior.mean[0].numel()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        checkpoint.log(step, loss)
    return vae


@torch.no_grad()
def fold_statistics(vae: AutoencoderKL, images: torch.Tensor) -> None:
    """Make the latents of the pictures standard normal, by scaling the convolutions around them in place."""
    latents = torch.cat([vae.encode(batch).latent_dist.mean for batch in images.split(100)])
    mean, deviation = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    to_latent, from_latent = vae.quant_conv, vae.post_quant_conv
    channels = len(mean)
    to_latent.weight[:channels] /= deviation[:, None, None, None]
    to_latent.bias[:channels] = (to_latent.bias[:channels] - mean) / deviation
    to_latent.bias[channels:] -= 2 * deviation.log()
    from_latent.bias += (from_latent.weight[:, :, 0, 0] * mean).sum(1)
    from_latent.weight *= deviation[None, :, None, None]


def main() -> None:
    """Train and save the autoencoder to `build/vae`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, help="default: 2,600, of the decoder alone 1,000")
    parser.add_argument("--decoder-only", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    steps = arguments.steps or (1000 if arguments.decoder_only else 2600)
    vae = train(steps, arguments.decoder_only).eval()
    if not arguments.decoder_only:
        fold_statistics(vae, load_images())
    vae.save_pretrained(BUILD / "vae")


if __name__ == "__main__":
    main()
