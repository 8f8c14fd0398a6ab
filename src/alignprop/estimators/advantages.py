"""How much better than usual a picture is."""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from alignprop import distributed


@dataclass
class PromptStatistics:
    """Latest rewards of each prompt, by which a reward becomes an advantage.

    Attributes:
        size: how many are remembered of a prompt.
        min_count: below so many of its own, a prompt is measured by the present step's pictures.
        seen: the remembered rewards.
    """

    size: int = 16
    min_count: int = 16
    seen: dict[str, deque[float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse numbers that give no deviation, or are never reached."""
        if self.min_count < 2:
            raise ValueError(f"min_count={self.min_count} needs at least 2: one reward has no deviation.")
        if self.size < self.min_count:
            raise ValueError(f"buffer_size={self.size} needs at least min_count={self.min_count}.")

    def observe(self, prompts: Sequence[str], scores: Sequence[float]) -> None:
        """Remember the rewards of one step, of all processes."""
        for prompt, score in zip(prompts, scores, strict=True):
            self.seen.setdefault(prompt, deque(maxlen=self.size)).append(score)

    def judge(self, prompts: Sequence[str], scores: Tensor) -> tuple[Tensor, Tensor]:
        """Remember the rewards of a step, and say how much better than usual its pictures are.

        Args:
            prompts: of this process's B pictures.
            scores: (B,), their rewards.

        Returns:
            The advantages of this process's pictures, (B,), and those of all processes, in order of rank.
        """
        mine = scores.float().cpu()
        everything = torch.cat(distributed.gather([mine]))
        self.observe(distributed.gather(list(prompts)), everything.tolist())
        own = self.advantages(prompts, mine, everything)
        return own, torch.cat(distributed.gather([own]))

    def advantages(self, prompts: Sequence[str], scores: Tensor, everything: Tensor) -> Tensor:
        """How much better than usual pictures are, in deviations.

        Args:
            prompts: B prompts.
            scores: (B,), their rewards.
            everything: (N,), the rewards of the present step, of all processes.
        """
        moments = []
        for prompt in prompts:
            own = self.seen.get(prompt, ())
            known = torch.tensor(own, dtype=torch.float64) if len(own) >= self.min_count else everything.double()
            moments.append((known.mean().item(), known.std(correction=0).item() + 1e-6))
        mean, std = torch.tensor(moments, dtype=torch.float64).T
        better: Tensor = (scores.double().cpu() - mean) / std
        return better.float()

    def state(self) -> dict[str, Any]:
        """What was remembered, as numbers in nested dictionaries."""
        return {"seen": {prompt: list(scores) for prompt, scores in self.seen.items()}}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Remember what :meth:`state` returned."""
        self.seen = {prompt: deque(scores, self.size) for prompt, scores in state.get("seen", {}).items()}
