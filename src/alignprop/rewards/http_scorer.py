"""Reward of a server that scores pictures over HTTP, without gradient."""

from __future__ import annotations

import base64
import http.client
import json
import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

from torch import Tensor

from alignprop.rewards.external import check_timeout, png_files, read_scores


class HttpScorer:
    """What a server says of PNG files: one POST for each batch.

    The request's body is JSON, ``{"images": ["iVBORw0...", ...], "prompts": ["a cat", ...]}``, the files in base64.
    The answer is a JSON list with one number a picture, higher is better, or ``{"scores": [...]}``.
    """

    differentiable = False

    def __init__(self, url: str, timeout_s: float = 60.0) -> None:
        """Choose the server.

        Args:
            url: Begins with http:// or https://; pictures and prompts are sent there.
            timeout_s: After so many seconds without an answer the run is ended.

        Raises:
            ValueError: The address is of another kind, or the timeout not above 0.
        """
        if urlsplit(str(url)).scheme not in ("http", "https") or not urlsplit(str(url)).netloc:
            raise ValueError(f"url={url!r} needs the form http://host:port/path or https://host/path.")
        self.url = url
        self.timeout_s = check_timeout(timeout_s)
        self._opener = urllib.request.build_opener(_NoRedirect)

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score pictures (B, 3, H, W) in [0, 1], rounded to 8 bits: shape (B,), float32.

        Raises:
            ValueError: The server cannot be reached, refuses, takes too long or answers something else.
        """
        files = [base64.b64encode(content).decode("ascii") for content in png_files(images)]
        body = json.dumps({"images": files, "prompts": list(prompts)}).encode()
        return read_scores(self._post(body), images, f"url={self.url}")

    def _post(self, body: bytes) -> bytes:
        request = urllib.request.Request(self.url, body, {"Content-Type": "application/json"}, method="POST")
        try:
            with self._opener.open(request, timeout=self.timeout_s) as answer:
                content: bytes = answer.read()
                return content
        except urllib.error.HTTPError as error:
            raise ValueError(f"url={self.url} refused the pictures with HTTP status {error.code}.") from error
        except TimeoutError as error:
            raise self._too_slow() from error
        except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
            reason = getattr(error, "reason", error)
            if isinstance(reason, TimeoutError):
                raise self._too_slow() from error
            raise ValueError(f"url={self.url} cannot be reached ({reason}); start the server, or mend it.") from error

    def _too_slow(self) -> ValueError:
        return ValueError(
            f"url={self.url} has not answered after timeout_s={self.timeout_s:g}; raise it, or evaluate fewer pictures "
            "at a time."
        )


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirected POST would go on as a GET without the pictures."""

    def redirect_request(self, *arguments: Any, **options: Any) -> None:
        return None
