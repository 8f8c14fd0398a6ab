"""Mixtures of low-rank updates: exact by stacking their factors, or compressed by a truncated SVD of the sum."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from alignprop.export import Update


@dataclass(frozen=True)
class Member:
    """An adapter and its share of a mixture.

    Attributes:
        name: what a person calls it.
        updates: of its layers by name; a convolution's factors have its kernel behind, (R, inputs, *kernel) and
            (outputs, R, 1, ...).
        weight: w in the mixture, any finite number: negative to go the other way, more than 1 to go beyond.
    """

    name: str
    updates: Mapping[str, Update]
    weight: float


@dataclass(frozen=True)
class Mixture:
    """What :func:`mix` gives.

    Attributes:
        updates: by layer, in float32 or wider, each with a scale of 1.
        weights: of the members by name; what the sum lacks of 1 is the base model's share.
        rank: the largest rank of a layer.
        error: ``|mixture - sum| / |sum|`` over all layers, in the Frobenius norm; 0 where nothing was cut off.
        errors: the same of each layer that was compressed.
    """

    updates: Mapping[str, Update]
    weights: Mapping[str, float]
    rank: int
    error: float
    errors: Mapping[str, float]

    @property
    def worst(self) -> str | None:
        """The layer whose update lost most; None if none was compressed."""
        return max(self.errors, key=lambda name: self.errors[name], default=None)

    @property
    def base_weight(self) -> float:
        """The base model's share, ``1 - sum_i w_i``."""
        return 1 - sum(self.weights.values())


def mix(members: Sequence[Member], rank: int | None = None) -> Mixture:
    """Add the updates of adapters up: ``sum_i w_i s_i B_i A_i`` in every layer.

    The sum is linear in the weights and has the form of an adapter itself, ``[w_1 s_1 B_1, w_2 s_2 B_2, ...]`` times
    ``[A_1; A_2; ...]``: a weight and a scale go into one factor, since in both they would count squared. Its rank is
    the sum of the members' ranks. A layer that a member does not adapt counts as zero there.

    Args:
        members: adapters of one base model, each under its own name.
        rank: compress every layer that exceeds it to this rank, by the best approximation in the Frobenius norm
            (Eckart and Young); None for the exact sum.

    Raises:
        ValueError: there is no member, two share a name, a weight is not finite, the rank is below 1, or the members'
            layers differ in shape.
    """
    _check(members, rank)
    updates, errors, lost, total = {}, {}, 0.0, 0.0
    for name in sorted({name for member in members for name in member.updates}):
        parts = [(member.weight, member.updates[name]) for member in members if name in member.updates]
        update = stacked(parts)
        if rank is None or len(update.down) <= rank:
            total += squared_norm(update)
        else:
            update, values = truncated(update, rank)
            squares = values.square()
            layer, discarded = squares.sum().item(), squares[rank:].sum().item()
            errors[name] = math.sqrt(discarded / layer) if layer else 0.0
            lost, total = lost + discarded, total + layer
        updates[name] = update
    return Mixture(
        updates=updates,
        weights={member.name: member.weight for member in members},
        rank=max(len(update.down) for update in updates.values()),
        error=math.sqrt(lost / total) if total else 0.0,
        errors=errors,
    )


def stacked(parts: Sequence[tuple[float, Update]]) -> Update:
    """The weighted sum of updates of one layer, exact, with a scale of 1.

    Args:
        parts: weights and updates. Those of weight 0 are left out; a layer without any other keeps a rank of 1.
    """
    dtype = torch.promote_types(parts[0][1].down.dtype, torch.float32)
    kept = [(weight, update) for weight, update in parts if weight != 0]
    if not kept:
        first = parts[0][1]
        return Update(torch.zeros_like(first.down[:1], dtype=dtype), torch.zeros_like(first.up[:, :1], dtype=dtype), 1)
    down = torch.cat([update.down.to(dtype) for _, update in kept])
    up = torch.cat([(weight * update.scale) * update.up.to(dtype) for weight, update in kept], dim=1)
    return Update(down, up, 1)


def truncated(update: Update, rank: int) -> tuple[Update, Tensor]:
    """The best update of a lower rank, its factors balanced; the layer's full matrix is never formed.

    With ``up = Q_u R_u`` and ``down^T = Q_d R_d``, the singular values of ``up @ down`` are those of the small
    ``R_u R_d^T``. All of it is computed in float64.

    Returns:
        The update, and all singular values of the one before, descending: those behind ``rank`` were cut off.
    """
    up_basis, up_rest = torch.linalg.qr(update.scale * update.up.flatten(1).double())
    down_basis, down_rest = torch.linalg.qr(update.down.flatten(1).double().T)
    left, values, right = torch.linalg.svd(up_rest @ down_rest.T, full_matrices=False)
    root = values[:rank].sqrt()
    up, down = up_basis @ left[:, :rank] * root, root[:, None] * (right[:rank] @ down_basis.T)
    kept = len(root)  # fewer than asked for, where the layer itself is smaller
    dtype = torch.promote_types(update.down.dtype, torch.float32)
    return (
        Update(
            down.reshape(kept, *update.down.shape[1:]).to(dtype),
            up.reshape(len(up), kept, *update.up.shape[2:]).to(dtype),
            1,
        ),
        values,
    )


def squared_norm(update: Update) -> float:
    """``|scale * up @ down|^2`` in the Frobenius norm, from products of the size of the rank."""
    up, down = update.up.flatten(1).double(), update.down.flatten(1).double()
    return update.scale**2 * ((up.T @ up) * (down @ down.T)).sum().item()


def _check(members: Sequence[Member], rank: int | None) -> None:
    names = [member.name for member in members]
    if not any(member.updates for member in members):
        raise ValueError("There is nothing to mix: give an adapter.")
    if len(set(names)) < len(names):
        raise ValueError(f"The members are named {', '.join(names)}: give each a name of its own.")
    if rank is not None and rank < 1:
        raise ValueError(f"rank={rank} needs to be at least 1, or None for the exact sum.")
    for member in members:
        if not math.isfinite(member.weight):
            raise ValueError(f"weight={member.weight} of {member.name} needs to be a finite number.")
    require_same_shapes({member.name: member.updates for member in members})


def require_same_shapes(members: Mapping[str, Mapping[str, Update]]) -> None:
    """Check that adapters are of one architecture, as far as their shapes tell.

    Args:
        members: updates by layer, by the member's name.

    Raises:
        ValueError: a layer has different shapes in two of them.
    """
    seen: dict[str, tuple[str, tuple[int, ...]]] = {}
    for member, updates in members.items():
        for layer, update in updates.items():
            shape = (len(update.up), *update.down.shape[1:])
            other, known = seen.setdefault(layer, (member, shape))
            if shape != known:
                raise ValueError(
                    f"{other} and {member} are adapters of different models: {layer} is {_sizes(known)} in one and "
                    f"{_sizes(shape)} in the other. Mix adapters of one base model."
                )


def _sizes(shape: Sequence[int]) -> str:
    return " × ".join(map(str, shape))
