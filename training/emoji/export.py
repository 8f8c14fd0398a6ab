"""Stage `export`: assembles the parts of `build/` in `src/alignprop/emoji/weights`, in half precision.

Any part may still be in training: the averaged weights of its last checkpoint are taken. The folder is written
beside its place and renamed, so that a reader never sees half of it.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import torch
from data import BUILD
from diffusers import AutoencoderKL, StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from text import load_tokenizer
from transformers import CLIPModel
from unet import Denoiser, make_scheduler

CARD = Path(__file__).parent / "card"
WEIGHTS = Path(__file__).parents[2] / "src" / "alignprop" / "emoji" / "weights"


def latest_checkpoint() -> Path:
    """The checkpoint of the stage `unet` that went furthest."""
    fine = BUILD / "denoiser-fine.pt"
    return fine if fine.exists() else BUILD / "denoiser.pt"


def latest_pipeline() -> StableDiffusionPipeline:
    """The text-to-image pipeline, its denoiser from the stage `unet`, in float32 and frozen."""
    denoiser = Denoiser()
    denoiser.load_state_dict(torch.load(latest_checkpoint())["average"])
    pipe = StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(BUILD / "vae"),
        text_encoder=denoiser.text,
        tokenizer=load_tokenizer(),
        unet=denoiser.unet,
        scheduler=make_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    for part in (pipe.vae, pipe.text_encoder, pipe.unet):
        part.eval().requires_grad_(False)
    return pipe


def write_head(source: Path, folder: Path) -> None:
    """Copy the aesthetic head, the style classifier, the namer or the rater, in half precision."""
    folder.mkdir(exist_ok=True)
    state = load_file(source / "model.safetensors")
    save_file({name: tensor.half() for name, tensor in state.items()}, folder / "model.safetensors")
    shutil.copy(source / "config.json", folder)


def forget_paths(folder: Path) -> None:
    """Take out of the configurations where their parts were loaded from, which is a folder of this machine."""
    for path in folder.rglob("config.json"):
        config = json.loads(path.read_text())
        if config.pop("_name_or_path", None) is not None:
            path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def export() -> None:
    """Write the weights folder in place of the old one."""
    partial, old = WEIGHTS.with_name("weights.partial"), WEIGHTS.with_name("weights.old")
    shutil.rmtree(partial, ignore_errors=True)
    latest_pipeline().to(dtype=torch.float16).save_pretrained(partial)
    CLIPModel.from_pretrained(BUILD / "clip").half().save_pretrained(partial / "clip")
    load_tokenizer().save_pretrained(partial / "clip")
    write_head(BUILD / "head", partial / "aesthetic")
    write_head(BUILD / "classifier", partial / "classifier")
    write_head(BUILD / "names", partial / "names")
    write_head(BUILD / "rater", partial / "rater")
    shutil.copytree(CARD, partial, dirs_exist_ok=True)
    forget_paths(partial)
    shutil.rmtree(old, ignore_errors=True)
    if WEIGHTS.exists():
        os.replace(WEIGHTS, old)
    os.replace(partial, WEIGHTS)
    shutil.rmtree(old, ignore_errors=True)
    sizes = {path.relative_to(WEIGHTS): path.stat().st_size for path in WEIGHTS.rglob("*") if path.is_file()}
    step = torch.load(latest_checkpoint())["step"]
    print(f"{sum(sizes.values()) / 1e6:.1f} MB after {step} steps of the denoiser")
    print(json.dumps({str(name): size for name, size in sizes.items() if size > 1e6}))


if __name__ == "__main__":
    export()
