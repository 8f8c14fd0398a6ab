"""Stage `unet`: trains the denoiser and its text tower on the latents of the drawn concepts."""

from __future__ import annotations

import argparse
import copy

import numpy as np
import torch
import torch.nn.functional as F
from checkpoint import Checkpoint
from concepts import SHEET, STYLES, caption
from data import BUILD
from diffusers import DDIMScheduler, UNet2DConditionModel
from schedule import warm_up_and_decay
from text import text_config, tokenize
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CLIPModel, CLIPTextModel

SEED = 41
BATCH = 16
LEARNING_RATE = 7e-4
TEXT_RATE = 0.4
EMA_DECAY = 0.998
PLAIN_SHARE = 0.35
DROPPED_SHARE = 0.1
PLAIN_STYLES = torch.tensor([0.05, 0.25, 0.15, 0.55])
"""Shares of the styles under a caption without a style word, in the order of `STYLES`: what the base model prefers."""

FINE_RATE = 0.35
"""Learning rate of `--fine`, as a share of the full one."""


def make_unet() -> UNet2DConditionModel:
    """The untrained denoiser."""
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(64, 96, 160),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=192,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def make_scheduler() -> DDIMScheduler:
    """The noise schedule: its last step is pure noise, so sampling starts where training ends."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        steps_offset=1,  # without effect on trailing timesteps; diffusers warns without it
        set_alpha_to_one=True,
    )


class Denoiser(nn.Module):
    """The UNet and its text tower, which train together."""

    def __init__(self) -> None:
        super().__init__()
        self.unet = make_unet()
        self.text = CLIPTextModel(text_config())

    def take_text_tower(self, clip: CLIPModel) -> None:
        """Start from the text tower of the CLIP, which tells the concepts apart already."""
        tower = {name.removeprefix("text_model."): tensor for name, tensor in clip.state_dict().items()}
        own = self.text.state_dict()
        self.text.load_state_dict({name: tower[name.removeprefix("text_model.")] for name in own})

    def forward(self, latents: Tensor, timesteps: Tensor, tokens: Tensor) -> Tensor:
        """Predict the velocity for token ids (B, 24)."""
        return self.unet(latents, timesteps, self.text(tokens).last_hidden_state).sample


class Batches:
    """Draws latents with token ids of their captions."""

    def __init__(self, generator: torch.Generator) -> None:
        data = np.load(BUILD / "data.npz")
        drawn = data["concept"] < len(SHEET)
        self._generator = generator
        self._latents = torch.load(BUILD / "latents.pt")
        self._concept = torch.from_numpy(data["concept"][drawn])
        self._style = torch.from_numpy(data["style"][drawn])
        captions = [[caption(concept, style) for style in (*STYLES, None)] for concept in SHEET]
        self._tokens = tokenize([words for row in captions for words in row]).unflatten(0, (-1, len(STYLES) + 1))
        self._empty = tokenize([""])[0]
        self._row = torch.zeros(len(SHEET), len(STYLES), dtype=torch.long)
        self._row[self._concept, self._style] = torch.arange(len(self._concept))

    def draw(self) -> tuple[Tensor, Tensor]:
        """Latents (B, 4, 16, 16) and token ids (B, 24)."""
        rows = torch.randint(len(self._concept), (BATCH,), generator=self._generator)
        variant = torch.randint(len(self._latents), (BATCH,), generator=self._generator)
        chance = torch.rand(BATCH, generator=self._generator)
        plain, dropped = chance < PLAIN_SHARE, chance > 1 - DROPPED_SHARE
        style = torch.multinomial(PLAIN_STYLES, BATCH, replacement=True, generator=self._generator)
        rows = torch.where(plain, self._row[self._concept[rows], style], rows)
        tokens = self._tokens[self._concept[rows], torch.where(plain, len(STYLES), self._style[rows])]
        return self._latents[variant, rows], torch.where(dropped[:, None], self._empty, tokens)


def velocity_loss(
    denoiser: Denoiser, scheduler: DDIMScheduler, latents: Tensor, tokens: Tensor, generator: torch.Generator
) -> Tensor:
    """Squared error of the predicted velocity at random timesteps, spread evenly over the batch."""
    count = len(latents)
    offsets = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    timesteps = (offsets * scheduler.config.num_train_timesteps).long()
    noise = torch.randn(latents.shape, generator=generator)
    noised = scheduler.add_noise(latents, noise, timesteps)
    with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):  # faster than flash on a CPU
        velocity = denoiser(noised, timesteps, tokens)
    return F.mse_loss(velocity.float(), scheduler.get_velocity(latents, noise, timesteps))


@torch.no_grad()
def update_average(average: Denoiser, denoiser: Denoiser, step: int) -> None:
    """Exponential moving average of the weights, faster at the start."""
    decay = min(EMA_DECAY, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(average.parameters()), list(denoiser.parameters()), 1 - decay)


def train(steps: int, *, fine: bool = False) -> Denoiser:
    """Train, from the last checkpoint if there is one; returns the averaged weights.

    Args:
        steps: Of the whole training.
        fine: Go on from the finished training of another mixture of data, at a lower rate, in `denoiser-fine.pt`.
    """
    torch.manual_seed(SEED)
    denoiser, scheduler = Denoiser(), make_scheduler()
    if fine:
        denoiser.load_state_dict(torch.load(BUILD / "denoiser.pt")["average"])
    else:
        denoiser.take_text_tower(CLIPModel.from_pretrained(BUILD / "clip"))
    average = copy.deepcopy(denoiser).requires_grad_(False)
    rate = (FINE_RATE if fine else 1.0) * LEARNING_RATE
    groups = [
        {"params": denoiser.unet.parameters(), "lr": rate},
        {"params": denoiser.text.parameters(), "lr": TEXT_RATE * rate},
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.01, betas=(0.9, 0.99), fused=True)
    schedule = warm_up_and_decay(optimizer, steps, warm_up=200)
    generator = torch.Generator().manual_seed(SEED)
    batches = Batches(generator)
    parts = {"denoiser": denoiser, "average": average, "optimizer": optimizer, "schedule": schedule}
    checkpoint = Checkpoint(BUILD / ("denoiser-fine.pt" if fine else "denoiser.pt"), parts, generator)
    for step in checkpoint.steps(steps):
        loss = velocity_loss(denoiser, scheduler, *batches.draw(), generator)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(denoiser.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        update_average(average, denoiser, step)
        checkpoint.log(step, loss)
    return average


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=7600)
    parser.add_argument("--fine", action="store_true", help="go on from denoiser.pt, for --steps, at a lower rate")
    torch.set_num_threads(1)
    arguments = parser.parse_args()
    train(arguments.steps, fine=arguments.fine)
