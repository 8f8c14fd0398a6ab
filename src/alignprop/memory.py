"""Activation memory: measured in live tensor bytes, and the fastest checkpointing mode that fits."""

import os
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from alignprop.seams import Checkpointing, NoBlocksError

FASTEST_FIRST: tuple[Checkpointing, ...] = ("none", "block", "step", "nested")


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that are made, and not yet freed, inside the context.

    Exact on CPU, where resident memory mostly shows the allocator's habits.

    Attributes:
        now: live bytes at present.
        peak: their maximum so far.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = 0
        self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operation and count the storages that are new in its output."""
        for leaf in tree_iter((args, kwargs)):
            self._meet(leaf, counts=False)  # made outside: an output may be a view of it
        output = func(*args, **(kwargs or {}))
        for leaf in tree_iter(output):
            self._meet(leaf, counts=True)
        return output

    def _meet(self, leaf: Any, *, counts: bool) -> None:
        if not isinstance(leaf, Tensor):
            return
        storage = leaf.untyped_storage()
        if storage._cdata in self._known:
            return
        num_bytes = storage.nbytes() if counts else 0
        self._known.add(storage._cdata)
        self.now += num_bytes
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, storage._cdata, num_bytes)

    def _forget(self, key: int, num_bytes: int) -> None:
        self._known.discard(key)
        self.now -= num_bytes


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """The most memory, in bytes, that ``run`` holds at once in tensors of its own."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device)) - before
    live = LiveBytes()
    with live:
        run()
    return live.peak


def available_bytes(device: torch.device) -> int:
    """Memory that is free for this process's activations, in bytes."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free)
    import psutil

    return int(psutil.virtual_memory().available) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


@dataclass(frozen=True)
class MemoryPlan:
    """Chooses the checkpointing mode for a number of live steps.

    Attributes:
        limit: bytes that a micro-batch may hold in activations.
        costs: for each mode measured, the peak bytes with one live step and what every further one adds.
    """

    limit: int
    costs: Mapping[Checkpointing, tuple[int, int]]

    def __call__(self, live_steps: int) -> Checkpointing:
        """The fastest mode that fits, or the thriftiest if none does."""
        for mode in FASTEST_FIRST:
            if mode in self.costs and self.predict(mode, live_steps) <= self.limit:
                return mode
        return min(self.costs, key=lambda mode: self.predict(mode, live_steps))

    def predict(self, mode: Checkpointing, live_steps: int) -> int:
        """Peak bytes of a micro-batch."""
        first, further = self.costs[mode]
        return first + (live_steps - 1) * further


def plan_memory(
    run: Callable[[int, Checkpointing], object], *, max_live_steps: int, limit: int, device: torch.device
) -> MemoryPlan:
    """Measure the modes, fastest first, until one fits the longest window.

    Args:
        run: one rollout with its backward pass, given the number of live steps (1 or 2) and the mode.
        max_live_steps: the longest window that training may draw.
        limit: bytes that may be used.
        device: where it runs.

    Raises:
        ValueError: no mode fits at all.
    """
    costs: dict[Checkpointing, tuple[int, int]] = {}
    plan = MemoryPlan(limit, costs)
    for mode in FASTEST_FIRST:
        try:
            one, two = (peak_bytes(lambda live=live, mode=mode: run(live, mode), device) for live in (1, 2))  # type: ignore[misc]
        except (torch.OutOfMemoryError, NoBlocksError):
            continue  # that one does not fit, or the model has no such blocks
        costs[mode] = (one, max(two - one, 0))
        if plan.predict(mode, max_live_steps) <= limit:
            break
    if not costs:
        raise ValueError("Two denoising steps do not fit into memory in any checkpointing mode: use a smaller batch.")
    return plan


def peak_resident_bytes(device: torch.device) -> int:
    """The most memory that this process has held so far: on the GPU, or resident on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource
    import sys

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
