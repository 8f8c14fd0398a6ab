"""FlowBP-Sparse: cached sampling, a few steps re-forwarded with their integration weights (arXiv 2606.11075).

The picture is ``x_0 = x_T + sum_i w_i v_i`` with the scheduler's integration weights, ``w_i = sigma_{i+1} - sigma_i``
for Euler's steps of flow matching. Sampling keeps no graph; the velocities of the steps in S are computed again, each
from its cached latents, one at a time: ``grad = sum_{i in S} w_i J^T dv_theta(sg(x_i)) / dtheta``. No product of
Jacobians arises, and memory does not grow with S. Other predictions take the weights that their scheduler gives them.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from alignprop.denoising import prediction_type
from alignprop.estimators.base import Estimate, MicroBatch, RewardGradient, ascend
from alignprop.rewards import WeightedSum
from alignprop.rollout import Sampler
from alignprop.steps import Plan, Transition


@dataclass(frozen=True)
class FlowBPSparse(RewardGradient):
    """Gradients of selected steps, added up.

    Attributes:
        steps: how many are selected, without replacement; at most all.
        late_bias: step i (from 0, the noisiest) is drawn with a probability proportional to ``(i + 1) ** late_bias``.
        rescale: 0 takes the integration weights as they are; 1 scales them so that the selected steps stand for those
            left out as well, by the sum of all ``|w_i|`` over that of the selected; between them linearly. Flow
            matching only.
    """

    steps: int = 3
    late_bias: float = 0.0
    rescale: float = 0.0

    def __post_init__(self) -> None:
        """Refuse what trains nothing before any model is loaded."""
        if self.steps < 1:
            raise ValueError(f"steps={self.steps} needs at least 1: no selected step means no gradient.")
        if not 0 <= self.rescale <= 1:
            raise ValueError(f"rescale={self.rescale:g} needs 0 <= rescale <= 1.")

    def __call__(self, sampler: Sampler, reward: WeightedSum, batch: MicroBatch, weight: float) -> Estimate:
        """One rollout and its backward pass; see :class:`~alignprop.estimators.base.RewardGradient`."""
        selected: list[int] = []
        sigmas: list[Tensor] = []

        def plan(num_steps: int) -> Plan:
            selected.extend(self.draw(num_steps, batch.generator))
            return Plan(live=selected, input_gradient=0.0)

        def look(seen: Transition) -> None:
            if self.rescale and seen.step == 0:
                sigmas.append(_sigmas(seen))

        # Checkpointed step by step: forward without a graph, and again when the gradient arrives.
        rollout = sampler.rollout(batch.prompts, batch.seeds, plan=plan, on_step=look, checkpointing="step")
        weight *= self._scale(sigmas[0], selected) if sigmas else 1.0
        scores, components = ascend(reward, rollout, batch, weight)
        again = rollout.live_calls - rollout.live_calls // rollout.live_steps
        calls = rollout.calls + again * batch.descend.num_passes(rollout)
        return Estimate(scores, components, rollout.num_steps, rollout.live_steps, calls, len(scores))

    def draw(self, num_steps: int, generator: torch.Generator) -> list[int]:
        """The selected steps."""
        odds = torch.arange(1, num_steps + 1, dtype=torch.float64) ** self.late_bias
        drawn: list[int] = torch.multinomial(odds, min(self.steps, num_steps), generator=generator).tolist()
        return sorted(drawn)

    def _scale(self, sigmas: Tensor, selected: list[int]) -> float:
        weights = sigmas.diff().abs()
        whole = (weights.sum() / weights[selected].sum()).item()
        return 1 + self.rescale * (whole - 1)


def _sigmas(seen: Transition) -> Tensor:
    """Those that the run goes through."""
    if prediction_type(seen.scheduler) != "flow_prediction":
        raise ValueError(
            f"flowbp-sparse with rescale needs flow matching, and {type(seen.scheduler).__name__} is of another kind: "
            "leave rescale at 0."
        )
    sigmas: Tensor = seen.scheduler.sigmas[-seen.num_steps - 1 :].double()
    return sigmas
