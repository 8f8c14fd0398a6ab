"""What every page shares: templates, pictures inside the file, versions."""

from __future__ import annotations

import base64
import io
import platform
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from alignprop import __version__
from alignprop.report.wording import duration, lower_bound, memory, number, prompts_in_words, signed

if TYPE_CHECKING:
    from jinja2 import Template

_PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate")


def require_pages() -> None:
    """Check that pages can be written.

    Raises:
        ImportError: The extra `report` (jinja2, matplotlib) is not installed.
    """
    try:
        import jinja2  # noqa: F401
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError('The report needs jinja2 and matplotlib: pip install "alignprop[report]".') from error


def page_template(name: str) -> Template:
    """A template of the package, with the filters that pages share."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parents[1] / "templates"),
        autoescape=True,  # prompts and settings are the user's text
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "lower_bound": lower_bound,
        "number": number,
        "signed": signed,
        "duration": duration,
        "memory": memory,
        "prompts": prompts_in_words,
    }
    return environment.get_template(name)


def data_uri(path: Path, max_width: int) -> str:
    """A picture as a data URI, the file itself unless it is wider than `max_width` pixels."""
    data, kind = path.read_bytes(), "png"
    with Image.open(path) as image:
        if image.width > max_width:
            stream, kind = io.BytesIO(), "webp"
            image.thumbnail((max_width, image.height), Image.Resampling.LANCZOS)
            image.convert("RGB").save(stream, kind, quality=88)
            data = stream.getvalue()
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that numbers depend on."""
    packages = {package: version(package) for package in _PACKAGES}
    return {"python": platform.python_version(), "alignprop": __version__, **packages}
