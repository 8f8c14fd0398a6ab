"""A reward averaged over random views of a picture: the cheapest defence against adversarial pixels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from alignprop.pixels import clamp_straight_through
from alignprop.rewards.differentiable import is_differentiable
from alignprop.rewards.modality import modality_of

if TYPE_CHECKING:
    from alignprop.rewards.base import Reward


class Augmented(nn.Module):
    """The mean score of random views: cropped a little and enlarged again, shifted, with a little noise.

    What a reward sees in all of them is in the picture; a pattern of single pixels that fools it is not. Views are
    scored one after the other, so that a checkpointed reward holds the activations of one.

    Attributes:
        seeds: Of the draws, one a picture; None for the picture's place in the batch. The trainer sets them for
            each micro-batch, so that a draw depends on the run's seed and on the picture, and not on its company.
    """

    def __init__(self, reward: Reward, views: int = 4, shift: int = 2, crop: float = 0.1, noise: float = 0.02) -> None:
        """Choose the views.

        Args:
            reward: Scores pictures or videos; all frames of a video get one crop and shift, and noise each.
            views: How many; each costs what the reward costs.
            shift: Largest shift in pixels, to each side; the border is repeated.
            crop: Largest part of height and width that is cut away, at most a half.
            noise: Deviation of Gaussian noise, where white is 1; results are clamped to [0, 1], and the gradient
                passes the clamp.

        Raises:
            ValueError: A number is out of its range, all leave the picture as it is, or the reward is of sound.
        """
        super().__init__()
        for name, value, bound in (("shift", shift, None), ("crop", crop, 0.5), ("noise", noise, 1)):
            if value < 0 or (bound is not None and value > bound):
                raise ValueError(f"{name}={value} needs 0 <= {name}{'' if bound is None else f' <= {bound}'}.")
        if views < 1:
            raise ValueError(f"views={views} needs 1 <= views.")
        if not (shift or crop or noise):
            raise ValueError("shift=0, crop=0 and noise=0 change nothing; raise one of them.")
        if modality_of(reward) == "audio":
            raise ValueError("a waveform has no crops and shifts; leave out the augmentation of a reward of sound.")
        self.reward = reward
        self.modality, self.differentiable = modality_of(reward), is_differentiable(reward)
        self.num_views, self.shift, self.crop, self.noise = views, shift, crop, noise
        self.seeds: Sequence[int] | None = None

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score each image: the mean over its views."""
        scores = [self.reward(view, prompts) for view in self.views(images)]
        return torch.stack(scores).mean(0)

    def views(self, images: Tensor) -> list[Tensor]:
        """Random views of pictures (B, 3, H, W) or videos (B, F, 3, H, W), each of the same shape."""
        generators = self._generators(len(images))
        return [self._view(images, generators) for _ in range(self.num_views)]

    def _generators(self, num: int) -> list[torch.Generator]:
        """One a picture; where there are more pictures than seeds, frames of videos, several go on with one."""
        seeds = range(num) if self.seeds is None else self.seeds
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return [generators[i * len(generators) // num] for i in range(num)]

    def _view(self, images: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        height, width = images.shape[-2:]
        crop, *places = torch.stack([torch.rand(5, generator=g, dtype=torch.float64) for g in generators], 1)
        cut, (up, left, down, right) = self.crop * crop, places
        shifts = [((2 * self.shift + 1) * draw).floor() - self.shift for draw in (down, right)]
        rows = window_matrix(height, cut, up * cut * height + shifts[0])
        columns = window_matrix(width, cut, left * cut * width + shifts[1])
        for _ in range(images.ndim - 3):  # one window for the channels and frames of a picture
            rows, columns = rows.unsqueeze(1), columns.unsqueeze(1)
        view = rows.to(images) @ images @ columns.mT.to(images)
        if not self.noise:
            return view
        noise = torch.stack([torch.randn(images.shape[1:], generator=g) for g in generators])
        return clamp_straight_through(view + self.noise * noise.to(images))


def window_matrix(length: int, cut: Tensor, start: Tensor) -> Tensor:
    """Linear interpolation of windows of a line, enlarged to its length.

    A matrix, where `grid_sample` would do, since the gradient of the latter is not deterministic on a GPU.

    Args:
        length: Of the line, in pixels.
        cut: Part of it that a window leaves out, shape (B,), float64.
        start: Where the windows begin, in pixels, shape (B,); beyond the line its ends are repeated.

    Returns:
        Shape (B, length, length), float64: rows are the pixels of the window, columns those of the line.
    """
    scale = 1 - cut[:, None]
    # Of the centres of pixels; whole numbers stay whole, so that a mere shift blurs nothing.
    places = start[:, None] + torch.arange(length) * scale + (scale - 1) / 2
    below = places.floor()
    matrix = torch.zeros(len(cut), length, length, dtype=places.dtype)
    for offset, weight in ((0, below + 1 - places), (1, places - below)):
        matrix.scatter_add_(2, (below + offset).long().clamp(0, length - 1)[..., None], weight[..., None])
    return matrix
