"""Claims: a process that works on a run locks a file, so that another process takes another run.

The system gives a lock back when its process ends, however that happens: no claim outlives who made it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout


@contextmanager
def claimed(lock: Path) -> Iterator[bool]:
    """Hold a claim while the block runs; yields whether it could be had. The empty file of the lock remains."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    claim = FileLock(lock)
    try:
        claim.acquire(blocking=False)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        claim.release()
