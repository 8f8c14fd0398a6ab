"""Truncations draw what they say, from the real number of denoising steps, and never nothing."""

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tiny
from alignprop.estimators import AlignProp, MicroBatch
from alignprop.rewards import as_weighted_sum
from alignprop.rollout import Sampler
from alignprop.truncation import All, Gaussian, Last, Uniform


def draws(truncation, num_steps, count=6000):
    generator = torch.Generator().manual_seed(0)
    return [truncation.draw(num_steps, generator) for _ in range(count)]


def test_all_and_last_are_constant():
    assert set(draws(All(), 7, 5)) == {7}
    assert set(draws(Last(3), 7, 5)) == {3}


def test_uniform_draws_every_length_as_often():
    counts = Counter(draws(Uniform(), 6))
    assert sorted(counts) == [1, 2, 3, 4, 5, 6]
    assert all(abs(count - 1000) < 4 * (1000 * 5 / 6) ** 0.5 for count in counts.values())
    assert set(draws(Uniform(low=2, high=4), 6)) == {2, 3, 4}


def test_gaussian_has_its_mean_and_deviation_and_stays_inside():
    drawn = torch.tensor(draws(Gaussian(mean=25, std=5), 50), dtype=torch.float)
    assert drawn.mean().item() == pytest.approx(25, abs=0.3)
    assert drawn.std().item() == pytest.approx(5, rel=0.05)
    assert set(draws(Gaussian(mean=1, std=100), 4)) == {1, 2, 3, 4}


@given(num_steps=st.integers(1, 60), low=st.integers(1, 60), seed=st.integers(0, 2**31))
def test_no_draw_leaves_the_chain(num_steps, low, seed):
    generator = torch.Generator().manual_seed(seed)
    for truncation in (All(), Uniform(low=min(low, num_steps)), Gaussian(min(low, num_steps), std=10)):
        assert 1 <= truncation.draw(num_steps, generator) <= num_steps


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Last(0), "truncation.steps=0 needs at least 1"),
        (lambda: Uniform(low=0), "low=0"),
        (lambda: Uniform(low=5, high=2), "low=5 and high=2"),
        (lambda: Gaussian(mean=0, std=1), "mean=0"),
        (lambda: Gaussian(mean=3, std=-1), "std=-1"),
    ],
)
def test_what_can_never_fit_is_refused_at_once(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()


@pytest.mark.parametrize("truncation", [Last(49), Uniform(high=49), Uniform(low=49), Gaussian(mean=49, std=1)])
def test_a_window_longer_than_the_real_chain_is_refused_with_its_length(sd, truncation):
    """As the published defaults did: step 49 of a chain of 4 would never be live."""
    estimate = AlignProp(truncation)
    with pytest.raises(ValueError, match=r"truncation\.\w+=49 needs 1 <= \w+ <= 4, the number of denoising steps"):
        estimate(
            Sampler(sd, tiny.CALL),
            as_weighted_sum(lambda images, prompts: images.mean((1, 2, 3))),
            MicroBatch(0, tiny.PROMPTS, [0, 1], torch.Generator()),
            weight=1.0,
        )
