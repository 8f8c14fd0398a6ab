"""Gradient surgery: several rewards become one gradient without being added up first.

Let g_i be the gradient, over a whole optimizer step and all trained parameters together, of the i-th term of the
weighted sum: weight times reward, clamped and normalised where that is set. A rule makes ``sum_i c_i g_i`` of them:

    pcgrad  each g_i loses, in a random order of the others, what of it points against a g_j,
            ``g_i <- g_i - min(g_i . g_j, 0) / |g_j|^2  g_j``, and the results are added up (arXiv 2001.06782, alg. 1)
    mgda    ``c = argmin |sum_i c_i g_i|  with  c_i >= 0, sum_i c_i = 1``, the shortest vector of the convex hull
            (arXiv 1810.04650, eq. 3): along it, all terms that have a share rise alike, and the others no less

Both depend on the inner products of the g_i alone, so the rules below see these and not the gradients. What is no
reward (the regularisers' penalty, a pretraining loss) is added to the result and never projected.
"""

import itertools
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from alignprop import distributed
from alignprop.rewards import WeightedSum, check_scores
from alignprop.rollout import Rollout

_CHUNK = 2**20
_RESOLUTION = 1e-12


def pcgrad(products: Tensor, orders: Sequence[Sequence[int]]) -> Tensor:
    """What to multiply each gradient with, so that conflicts are projected away.

    Args:
        products: (R, R), inner products of the gradients.
        orders: for each gradient, in which order it is compared with the others, as a permutation of 0 .. R - 1.

    Returns:
        (R,); all ones where no two gradients conflict.
    """
    mixtures = torch.eye(len(products), dtype=products.dtype)  # row i: what the i-th projected gradient is made of
    for mixture, own, order in zip(mixtures, range(len(products)), orders, strict=True):
        for other in order:
            along = mixture @ products[:, other]
            if other != own and along < 0:
                mixture[other] -= along / products[other, other]
    return mixtures.sum(0)


def mgda(products: Tensor) -> Tensor:
    """What to multiply each gradient with, to get the shortest vector of their convex hull.

    A gradient that is zero has no say and gets 0: with it in the hull nothing would move, and a reward that has reached
    its target everywhere would end the training of the others.

    Args:
        products: (R, R), inner products of the gradients, in float64.

    Returns:
        (R,), none negative, with the sum 1; all zeros where all gradients are zero.
    """
    weights = torch.zeros(len(products), dtype=products.dtype)
    moving = products.diagonal().nonzero().flatten()
    if len(moving):
        own = products[moving][:, moving]
        # With x = t c, the least of t^2 c'Gc + (t - 1)^2 over t rises with c'Gc: a simplex becomes an orthant.
        found = _least(own / own.diagonal().min() + 1)
        weights[moving] = found / found.sum()
    return weights


def _least(quadratic: Tensor) -> Tensor:
    """The x >= 0 with the least ``x'Qx / 2 - sum x``, by active sets (Lawson and Hanson 1974, ch. 23); Q is (n, n)."""
    x, active = torch.zeros(len(quadratic), dtype=quadratic.dtype), list[int]()
    for _ in range(10 * len(x)):  # a bound that only rounding could reach
        slope = 1 - quadratic @ x
        slope[active] = 0
        if slope.max() <= _RESOLUTION:
            break
        active.append(int(slope.argmax()))
        while active:
            wanted = torch.zeros_like(x)
            wanted[active] = _solved(quadratic[active][:, active])
            leaving = [place for place in active if wanted[place] <= 0]
            if not leaving:
                x = wanted
                break
            shares = {place: float(x[place] / (x[place] - wanted[place])) if x[place] else 0.0 for place in leaving}
            first = min(leaving, key=shares.__getitem__)
            x = x + shares[first] * (wanted - x)
            x[first] = 0
            active.remove(first)
    return x


def _solved(matrix: Tensor) -> Tensor:
    """Solve ``matrix x = 1``, with rows and columns brought to one scale before."""
    scale = matrix.diagonal().rsqrt()
    inverse: Tensor = torch.linalg.pinv(matrix * scale * scale[:, None], hermitian=True)
    return scale * (inverse @ scale)


RULES: Mapping[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    "pcgrad": lambda products, generator: pcgrad(
        products, [torch.randperm(len(products), generator=generator).tolist() for _ in products]
    ),
    "mgda": lambda products, _: mgda(products),
}
"""From the inner products of the gradients, and what draws an order, to a factor for each gradient."""


def inner_products(gradients: Tensor) -> Tensor:
    """Those of R gradients (R, P) with one another, (R, R), in float64 on CPU."""
    wide = torch.float32 if gradients.device.type == "mps" else torch.float64  # which that device has not
    parts = (part.to(wide) for part in gradients.split(_CHUNK, dim=1))
    return torch.stack([(part @ part.T).cpu().double() for part in parts]).sum(0)


def left_over(combination: str, gradients: Tensor) -> float:
    """How much of the length of R gradients (R, P) a combination leaves, in [0, 1]: 0 where they cancel.

    Of gradients that are all zero, of rewards that have reached their targets, nothing is lost: 1.
    """
    generator = torch.Generator()
    rule = RULES.get(combination)
    factors = torch.ones(len(gradients)) if rule is None else rule(inner_products(gradients), generator)
    parts = factors.to(gradients)[:, None] * gradients
    lengths = parts.norm(dim=1).sum()
    return (parts.sum(0).norm() / lengths).item() if lengths > 0 else 1.0


def refusals(combination: str, rewards: Sequence[str], estimator: str, needs_gradient: bool) -> Iterator[str]:
    """One sentence if a combination is unknown or could have no effect.

    Args:
        combination: ``sum``, or a row of :data:`RULES`.
        rewards: names of those that are trained.
        estimator: its name.
        needs_gradient: whether it backpropagates the rewards.
    """
    setting = f"combination={combination}"
    if combination == "sum":
        return
    if combination not in RULES:
        yield f"{setting} is unknown; choose one of sum, {', '.join(RULES)}."
    elif not needs_gradient:
        yield (
            f"{setting} compares the gradients of rewards, and estimator {estimator} backpropagates none: use "
            "combination=sum, or an estimator that backpropagates the reward, such as alignprop."
        )
    elif len(rewards) == 1:
        yield f"{setting} needs at least two rewards, and there is {rewards[0]}: add another, or use combination=sum."


class Surgery:
    """Keeps the gradients of the rewards of one optimizer step apart, and then makes one of them by a rule.

    It is a :class:`~alignprop.estimators.base.Descent`. Whatever else is backpropagated during the step gathers in
    ``parameter.grad``, as ever.

    Attributes:
        gradients: (R + 1, P), of the rewards so far; the last row is for what is no reward.
    """

    def __init__(self, rule: str, rewards: Sequence[str], parameters: Sequence[nn.Parameter]) -> None:
        """Begin a step.

        Args:
            rule: a row of :data:`RULES`.
            rewards: names of R rewards.
            parameters: what is trained, P numbers in all.
        """
        self._rule, self._rewards, self._parameters = rule, list(rewards), list(parameters)
        self._sizes, self._num_rollouts = [parameter.numel() for parameter in parameters], 0
        self.gradients = parameters[0].new_zeros(len(rewards) + 1, sum(self._sizes))

    def __call__(
        self, reward: WeightedSum, rollout: Rollout, prompts: Sequence[str], weight: float | Tensor
    ) -> dict[str, Tensor]:
        """Score pictures, and backpropagate each reward alone; see :class:`~alignprop.estimators.base.Descent`.

        Each reward is differentiated as far as the pixels, and its graph is freed, before the next is computed.
        """
        self._num_rollouts += 1
        # Detached, so that a reward's graph ends at the pixels and the chain's survives it.
        pixels = rollout.pixels.detach().requires_grad_(rollout.pixels.requires_grad)
        components, arriving = dict[str, Tensor](), list[Tensor]()
        for name in self._rewards:
            components[name], gradient = _at_the_pixels(reward, name, pixels, prompts, weight)
            arriving += gradient
        if pixels.requires_grad:
            self._through(rollout, arriving, weight)
        return components

    def _through(self, rollout: Rollout, arriving: Sequence[Tensor], weight: float | Tensor) -> None:
        """Backpropagate what has arrived at the pixels, and the penalty; the last pass frees the graph."""
        if rollout.penalty is not None:
            (weight * rollout.penalty).sum().backward(retain_graph=True)
        for place, gradient in enumerate(arriving):
            again = place + 1 < len(arriving)
            parts = torch.autograd.grad(
                rollout.pixels, self._parameters, gradient, retain_graph=again, allow_unused=True
            )
            self._add(place, parts)

    def _add(self, row: int, parts: Sequence[Tensor | None]) -> None:
        for total, part in zip(self.gradients[row].split(self._sizes), parts, strict=True):
            if part is not None:
                total += part.flatten()

    def num_passes(self, rollout: Rollout) -> int:
        """One for each reward, and one for the penalty."""
        return len(self._rewards) + (rollout.penalty is not None)

    def complete(self, parameters: Sequence[nn.Parameter], generator: torch.Generator) -> dict[str, Any]:
        """Sum over processes, in one all-reduce, apply the rule, and leave the result in ``parameter.grad``.

        Raises:
            ValueError: no reward was backpropagated by :func:`~alignprop.estimators.base.ascend`.
        """
        if not self._num_rollouts:
            raise ValueError(
                f"combination={self._rule} needs an estimator that backpropagates rewards by "
                "alignprop.estimators.base.ascend; use combination=sum with one that has its own backward pass."
            )
        self._add(-1, [parameter.grad for parameter in parameters])
        if distributed.process().num_processes > 1:
            torch.distributed.all_reduce(self.gradients)
        *gradients, total = self.gradients
        products = inner_products(self.gradients[:-1])
        finite = bool(products.isfinite().all())  # if not, the sum must be as little finite, for the scaler to see
        factors = RULES[self._rule](products, generator) if finite else torch.ones(len(products))
        for gradient, factor in zip(gradients, factors.tolist(), strict=True):
            total.add_(gradient, alpha=factor)
        for parameter, part in zip(parameters, total.split(self._sizes), strict=True):
            parameter.grad = part.view_as(parameter).to(parameter.dtype)
        facts = _facts(products, dict(zip(self._rewards, factors.tolist(), strict=True)))
        return facts if finite else dict.fromkeys(facts)


def _at_the_pixels(
    reward: WeightedSum, name: str, pixels: Tensor, prompts: Sequence[str], weight: float | Tensor
) -> tuple[Tensor, Sequence[Tensor]]:
    """The scores (B,) of one of the rewards, detached, and its loss's gradient; none without a graph to go on in."""
    scores = reward.component(name, pixels, prompts)
    check_scores(scores, pixels, name, prompts)
    if not pixels.requires_grad:
        return scores, ()
    return scores.detach(), torch.autograd.grad((-weight * reward.term(name, scores)).sum(), pixels)


def _facts(products: Tensor, factors: Mapping[str, float]) -> dict[str, Any]:
    """For the metrics: how far pairs of rewards agree, and what each one's gradient was multiplied with."""
    norms = products.diagonal().sqrt()
    cosines = [
        (products[i, j] / (norms[i] * norms[j])).item() if products[i, j] else 0.0
        for i, j in itertools.combinations(range(len(products)), 2)
    ]
    return {
        "gradient_cosine": statistics.fmean(cosines),
        "gradient_conflicts": statistics.fmean(cosine < 0 for cosine in cosines),
        "gradient_factors": dict(factors),
    }
