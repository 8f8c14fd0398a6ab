"""The optimizer's step: clipping, AdamW, the learning rate's schedule, the loss scale of fp16, and the average."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor, nn


@dataclass(frozen=True)
class Optimizer:
    """Settings of AdamW and of the step.

    Attributes:
        learning_rate: highest rate, reached after the warm-up.
        warmup_steps: optimizer steps over which the rate rises from zero.
        schedule: a name that ``diffusers.optimization.get_scheduler`` knows.
        betas: AdamW's.
        weight_decay: AdamW's.
        eps: AdamW's.
        max_grad_norm: bound of the gradient's norm over all parameters.
        ema_decay: decay of the average of the adapter that is evaluated and saved; None for no average.
    """

    learning_rate: float = 1e-3
    warmup_steps: int = 0
    schedule: str = "constant_with_warmup"
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 1e-4
    eps: float = 1e-8
    max_grad_norm: float = 1.0
    ema_decay: float | None = None


class Optimisation:
    """Changes parameters by their gradients.

    Attributes:
        settings: of AdamW and of the step.
        parameters: what is changed.
        adamw: the optimizer.
        ema: the average of the parameters; None for none.
        scaler: of the loss, where half precision would round small gradients to zero.
    """

    def __init__(self, settings: Optimizer, parameters: Sequence[nn.Parameter], num_steps: int, *, half: bool) -> None:
        """Set up for a run.

        Args:
            settings: of AdamW and of the step.
            parameters: at least one.
            num_steps: of the whole run, for the schedule.
            half: whether gradients go through fp16.
        """
        self.settings, self.parameters = settings, list(parameters)
        self.adamw = torch.optim.AdamW(
            self.parameters,
            lr=settings.learning_rate,
            betas=settings.betas,
            weight_decay=settings.weight_decay,
            eps=settings.eps,
        )
        # A pure function of the step, so that a resumed run needs no state of it.
        self._schedule = get_scheduler(
            settings.schedule, self.adamw, num_warmup_steps=settings.warmup_steps, num_training_steps=num_steps + 1
        ).lr_lambdas[0]
        self.ema = EMAModel(self.parameters, decay=settings.ema_decay) if settings.ema_decay is not None else None
        self.scaler = torch.amp.GradScaler(self.parameters[0].device.type, enabled=half)

    @property
    def loss_scale(self) -> float:
        """What losses are multiplied with, and gradients divided by."""
        return float(self.scaler.scale(torch.ones((), device=self.parameters[0].device)))

    def learning_rate(self, step: int) -> float:
        """The rate of a step, counted from 0."""
        return self.settings.learning_rate * float(self._schedule(step + 1))

    def clip(self) -> float:
        """Take the loss scale off the gradient and clip it; returns its norm before clipping, also if not finite."""
        self.scaler.unscale_(self.adamw)
        return float(torch.nn.utils.clip_grad_norm_(self.parameters, self.settings.max_grad_norm))

    def update(self, step: int, norm: float) -> None:
        """Change the parameters, and forget the gradient; in fp16 a gradient that is not finite changes nothing.

        Args:
            step: counted from 0.
            norm: what :meth:`clip` returned.
        """
        for group in self.adamw.param_groups:
            group["lr"] = self.learning_rate(step)
        self.scaler.step(self.adamw)
        self.scaler.update()
        self.adamw.zero_grad()
        if self.ema is not None and math.isfinite(norm):
            self.ema.step(self.parameters)

    @property
    def averages(self) -> list[Tensor]:
        """What is evaluated and saved: the average if there is one, else the present values."""
        return list(self.ema.shadow_params) if self.ema is not None else list(self.parameters)

    def state(self) -> dict[str, Any]:
        """What it must know again after resuming, beside the parameters."""
        return {
            "optimizer": self.adamw.state_dict()["state"],
            "average": None if self.ema is None else list(self.ema.shadow_params),
            "averaged_steps": 0 if self.ema is None else self.ema.optimization_step,
            "scaler": self.scaler.state_dict(),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state` returned, with the parameters as they were then."""
        self.adamw.load_state_dict({**self.adamw.state_dict(), "state": state["optimizer"]})
        if self.ema is not None:  # begun anew if the run had none before
            for shadow, value in zip(self.ema.shadow_params, state["average"] or self.parameters, strict=True):
                shadow.copy_(value.detach())
            self.ema.optimization_step = state["averaged_steps"]
        if self.scaler.is_enabled() and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
