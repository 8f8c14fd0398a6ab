"""Several processes: one all-reduce of the gradients, seeds that know the rank, and gathering."""

import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import nn

Result = TypeVar("Result")


def process() -> PartialState:
    """This process among the others (``process_index``, ``num_processes``, ``device``, ``is_main_process``)."""
    # Processes without an accelerator are each on their own, silently, unless accelerate is told that this is meant.
    return PartialState(cpu=int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.accelerator.is_available())


def derive_seed(*parts: int) -> int:
    """A seed in [0, 2**63) that depends on every part: independent streams from one base seed."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> 1)


def sum_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Sum the gradients over all processes, in one flat all-reduce; a missing gradient counts as zero."""
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    if process().num_processes == 1:
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    torch.distributed.all_reduce(flat)
    parts = flat.split([gradient.numel() for gradient in gradients])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view_as(gradient))


def gather(objects: list[Any]) -> list[Any]:
    """The objects of all processes in order of rank, on every process."""
    return gather_object(objects) if process().num_processes > 1 else objects


def together(work: Callable[[], Result]) -> Result:
    """Do this process's part of a work.

    Raises:
        ValueError: one of the processes raised it; on all of them, as the others would wait for what it was to give.
    """
    result, failure = None, None
    try:
        result = work()
    except ValueError as error:
        failure = str(error)
    if failures := [message for message in gather([failure]) if message is not None]:
        raise ValueError(failures[0])
    return cast(Result, result)


def check_identical(parameters: Sequence[nn.Parameter]) -> None:
    """Refuse to go on when the processes hold different weights.

    Raises:
        RuntimeError: they drifted apart.
    """
    if process().num_processes == 1:
        return
    sums = torch.stack([parameter.detach().double().sum() for parameter in parameters]).cpu()
    others = gather([sums])
    drifted = [rank for rank, other in enumerate(others) if not torch.equal(other, others[0])]
    if drifted:
        raise RuntimeError(f"The adapters of ranks {drifted} differ from rank 0's: start again from a checkpoint.")
