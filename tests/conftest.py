"""Tiny pipelines with random weights, built in code."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # tiny models gain nothing from more, and the tests run side by side
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

import tiny


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def sd():
    """A tiny Stable Diffusion in float32."""
    return tiny.stable_diffusion()


@pytest.fixture
def sd64():
    """The same in float64."""
    return tiny.stable_diffusion(torch.float64)
