"""Reward of a program of the user's: any language, no gradient."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from alignprop.rewards.external import check_timeout, png_files, read_scores


class Command:
    """What a program says of PNG files: it is started once for each batch.

    On its standard input it gets JSON, ``{"images": ["/tmp/.../0.png", ...], "prompts": ["a cat", ...]}``, and on
    its standard output it writes a JSON list with one number a picture, higher is better. The files are deleted
    when it has ended. No shell is involved.
    """

    differentiable = False

    def __init__(self, command: Sequence[str], timeout_s: float = 60.0) -> None:
        """Choose the program.

        Args:
            command: The program and its arguments, a list of texts such as ``[python, score.py]``.
            timeout_s: After so many seconds for a batch it is ended, and the run with it.

        Raises:
            ValueError: The command is no list of texts, or the timeout not above 0.
        """
        if isinstance(command, str) or not command or not all(isinstance(part, str) for part in command):
            raise ValueError(
                f"command={command!r} needs a list of texts, the program and its arguments, such as [python, score.py]:"
                " no shell takes it apart."
            )
        self.command = list(command)
        self.timeout_s = check_timeout(timeout_s)

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score pictures (B, 3, H, W) in [0, 1], rounded to 8 bits: shape (B,), float32.

        Raises:
            ValueError: The program cannot be started, fails, takes too long or answers something else.
        """
        with tempfile.TemporaryDirectory(prefix="alignprop-") as folder:
            paths = [Path(folder, f"{place}.png") for place in range(len(images))]
            for path, content in zip(paths, png_files(images), strict=True):
                path.write_bytes(content)
            answer = self._run(json.dumps({"images": [str(path) for path in paths], "prompts": list(prompts)}))
        return read_scores(answer, images, f"command={self.command}")

    def _run(self, question: str) -> bytes:
        try:
            ended = subprocess.run(self.command, input=question.encode(), capture_output=True, timeout=self.timeout_s)
        except subprocess.TimeoutExpired as error:
            raise ValueError(
                f"command={self.command} has not answered after timeout_s={self.timeout_s:g}; raise it, or evaluate "
                "fewer pictures at a time."
            ) from error
        except OSError as error:
            raise ValueError(
                f"command={self.command} cannot be started ({error.strerror}); give a program that can, and its "
                "arguments one by one."
            ) from error
        if ended.returncode:
            said = ended.stderr.decode("utf-8", "replace").strip().splitlines() or ["it said nothing"]
            raise ValueError(f"command={self.command} failed with exit code {ended.returncode}: {said[-1]}")
        return ended.stdout
