"""Tiny pipelines with random weights, built in code."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import tiny
import torch


@pytest.fixture(autouse=True)
def _two_threads():
    torch.set_num_threads(2)


@pytest.fixture
def sd():
    """A tiny Stable Diffusion in float32."""
    return tiny.stable_diffusion()


@pytest.fixture
def sd64():
    """The same in float64."""
    return tiny.stable_diffusion(torch.float64)
