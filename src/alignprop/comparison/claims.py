"""Claims: a process that works on a run says so in a file, so that another process takes another run."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

_TOLERANCE_S = 1.0
"""A process's start is not told more exactly than this; a process with the same number began at another time."""


@contextmanager
def claimed(lock: Path) -> Iterator[bool]:
    """Hold a claim while the block runs; yields whether it could be had.

    The claim of a process that is dead is taken over; one of another machine is believed, as nobody can tell.
    """
    mine = _claim(lock)
    try:
        yield mine
    finally:
        if mine:
            lock.unlink(missing_ok=True)


def holder(lock: Path) -> str | None:
    """The living process that holds a claim, in words; None for none."""
    text = _read(lock)
    if text is None or _is_stale(text):
        return None
    claim = json.loads(text)
    return f"process {claim['pid']} on {claim['host']}"


def _claim(lock: Path) -> bool:
    lock.parent.mkdir(parents=True, exist_ok=True)
    text = _read(lock)
    if text is not None and _is_stale(text):
        _remove(lock, text)
    own = lock.with_name(f"{lock.name}.{socket.gethostname()}-{os.getpid()}")
    process = psutil.Process()
    own.write_text(json.dumps({"pid": process.pid, "host": socket.gethostname(), "started": process.create_time()}))
    try:
        os.link(own, lock)  # appears whole, and only if there is none
    except FileExistsError:
        return False
    finally:
        own.unlink()
    return True


def _remove(lock: Path, stale: str) -> None:
    """Remove a stale claim; one that another process has put in its place meanwhile is put back."""
    moved = lock.with_name(f"{lock.name}.stale-{socket.gethostname()}-{os.getpid()}")
    try:
        os.rename(lock, moved)
    except FileNotFoundError:
        return
    if _read(moved) != stale:
        os.link(moved, lock)
    moved.unlink()


def _read(lock: Path) -> str | None:
    try:
        return lock.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None


def _is_stale(text: str) -> bool:
    """Whether the process that wrote a claim is dead, as far as this machine knows."""
    try:
        claim = json.loads(text)
        pid, host, started = int(claim["pid"]), claim["host"], float(claim["started"])
    except (ValueError, TypeError, KeyError):
        return True  # claims appear whole: this is none
    if host != socket.gethostname():
        return False
    try:
        return abs(psutil.Process(pid).create_time() - started) > _TOLERANCE_S
    except psutil.NoSuchProcess:
        return True
