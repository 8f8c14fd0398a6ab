"""Estimators that backpropagate a reward: each against its formula written by hand, and against one another."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import EDMEulerScheduler, HeunDiscreteScheduler
from PIL import Image

import tiny
from alignprop import distributed
from alignprop.estimators import (
    AlignProp,
    AsReleased,
    DraftK,
    DraftLV,
    DRTune,
    FlowBPSparse,
    LeapAlign,
    MicroBatch,
    ReFL,
    leapalign,
)
from alignprop.estimators.denoising_loss import noise_of
from alignprop.rewards import as_weighted_sum
from alignprop.rollout import Sampler
from alignprop.spec import spec_of
from alignprop.truncation import All, Last
from test_rollout import contrast, gradient, perturbed, relative
from zoo import ROWS

T, GUIDANCE, WEIGHT, SEEDS = 5, 5.0, 0.5, [3, 4]
KINDS = ("epsilon", "v_prediction", "flow_prediction")
IN_FLOAT32 = 1e-5
"""Schedulers keep their alphas in float32, and flow matching rounds the latents."""


class ByHand:
    """A tiny pipeline's sampling without the library; steps are counted from 0, the noisiest."""

    def __init__(self, pipeline, num_steps, prompts=tiny.PROMPTS):
        self.pipeline, self.num_steps, self.start = pipeline, num_steps, noise_of_seeds(SEEDS)
        self.prepare(prompts)

    def predict(self, x, i):
        negative, output = self.denoise(torch.cat([x, x]), i).chunk(2)
        return negative + GUIDANCE * (output - negative)

    def step(self, x, i, output):
        return self.leap(x, i, i + 1, output)

    def noised(self, x_0, noise, i):
        return self.alphas[i] * x_0 + self.sigmas[i] * noise

    def denoising_loss(self, x_0, seeds):
        """Of each picture, without guidance; the first step has the pipeline's own latents."""
        losses = []
        for i in range(self.num_steps):
            x_t = self.noised(x_0, noise_of(x_0, seeds, i - 1), i) if i else noise_of_seeds(seeds)
            noise = (x_t - self.alphas[i] * x_0) / self.sigmas[i]
            losses.append((self.denoise(x_t, i) - self.target(x_0, noise, i)).square().mean((1, 2, 3)))
        return sum(losses) / self.num_steps

    def pixels(self, x):
        config = self.pipeline.vae.config
        return self.pipeline.vae.decode(x / config.scaling_factor + (config.shift_factor or 0)).sample / 2 + 0.5


class DiffusionByHand(ByHand):
    """Stable Diffusion with DDIM (arXiv 2010.02502, eq. 12, eta 0), predicting noise or v (arXiv 2202.00512)."""

    def prepare(self, prompts):
        config, stride = self.pipeline.scheduler.config, 1000 // self.num_steps
        encoded, negative = self.pipeline.encode_prompt(prompts, "cpu", 1, True)
        self.context = torch.cat([negative, encoded])
        betas = torch.linspace(config.beta_start**0.5, config.beta_end**0.5, 1000, dtype=torch.float32) ** 2
        squares = torch.cumprod(1 - betas, 0).double()
        last = torch.ones(()) if config.set_alpha_to_one else squares[0]
        self.times = [step * stride + 1 for step in reversed(range(self.num_steps))]
        self.alphas = torch.stack([*squares[self.times], last]).sqrt()
        self.sigmas, self.kind = (1 - self.alphas**2).sqrt(), config.prediction_type

    def denoise(self, x, i):
        return self.pipeline.unet(x, self.times[i], self.context[-len(x) :]).sample

    def clean(self, x, i, output):
        alpha, sigma = self.alphas[i], self.sigmas[i]
        return (x - sigma * output) / alpha if self.kind == "epsilon" else alpha * x - sigma * output

    def leap(self, x, i, j, output):
        noise = output if self.kind == "epsilon" else self.alphas[i] * output + self.sigmas[i] * x
        return self.alphas[j] * self.clean(x, i, output) + self.sigmas[j] * noise

    def target(self, x_0, noise, i):
        return noise if self.kind == "epsilon" else self.alphas[i] * noise - self.sigmas[i] * x_0


class FlowByHand(ByHand):
    """Stable Diffusion 3 with Euler's steps of flow matching (arXiv 2210.02747), sigma falling evenly from 1 to 0."""

    def prepare(self, prompts):
        encoded, negative, pooled, negative_pooled = self.pipeline.encode_prompt(prompts, None, None)
        self.context, self.pooled = torch.cat([negative, encoded]), torch.cat([negative_pooled, pooled])
        self.sigmas = torch.tensor([*flow_sigmas(self.num_steps), 0.0]).double()  # of float32, as the scheduler's
        self.alphas = 1 - self.sigmas

    def denoise(self, x, i):
        times = (1000 * self.sigmas[i]).float().expand(len(x))
        return self.pipeline.transformer(x, self.context[-len(x) :], self.pooled[-len(x) :], times).sample

    def clean(self, x, i, output):
        return x - self.sigmas[i] * output

    def leap(self, x, i, j, output):
        return x - (self.sigmas[i] - self.sigmas[j]) * output

    def target(self, x_0, noise, i):
        return noise - x_0


def noise_of_seeds(seeds):
    return torch.cat([torch.randn(1, 4, 8, 8, generator=generator(s), dtype=torch.float64) for s in seeds])


def flow_sigmas(num_steps):
    return [1 - step / num_steps for step in range(num_steps)]


class Subject:
    """A tiny pipeline in float64 with an adapter that has an effect, and the same sampling by hand."""

    def __init__(self, kind):
        self.kind = kind
        if kind == "flow_prediction":
            self.pipeline = tiny.stable_diffusion_3(torch.float64)
        else:
            self.pipeline = tiny.stable_diffusion(torch.float64)
            # Its last alpha is 1 in one of the two, and not in the other.
            self.pipeline.scheduler = tiny.scheduler(prediction_type=kind, set_alpha_to_one=kind == "epsilon")
        self.adapter = perturbed(self.pipeline)

    def by_hand(self, prompts=tiny.PROMPTS):
        return (FlowByHand if self.kind == "flow_prediction" else DiffusionByHand)(self.pipeline, T, prompts)

    def call(self, num_steps=T):
        call = {"num_inference_steps": num_steps, "guidance_scale": GUIDANCE}
        return call | ({"sigmas": flow_sigmas(num_steps)} if self.kind == "flow_prediction" else {})

    def run(self, estimator, num_steps=T, draw=0, reward=None, **call):
        """What an estimator returns, and what it adds to the gradient."""
        parameters = list(self.adapter.parameters.values())
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        batch = MicroBatch(0, tiny.PROMPTS, SEEDS, torch.Generator().manual_seed(draw))
        sampler = Sampler(self.pipeline, self.call(num_steps) | call)
        estimate = estimator(sampler, as_weighted_sum(reward or each_contrast), batch, WEIGHT)
        return estimate, torch.cat([parameter.grad.flatten() for parameter in parameters])

    def gradient(self, estimator, num_steps=T, **settings):
        return self.run(estimator, num_steps, **settings)[1]

    def descent(self, pixels, weights=1.0):
        """The gradient of the loss, of pixels made by hand."""
        return gradient(-(WEIGHT * weights * each_contrast(pixels, tiny.PROMPTS)).sum(), self.adapter)


def each_contrast(images, prompts):
    return torch.stack([(place + 1) * contrast(image) for place, image in enumerate(images)])


@pytest.fixture(scope="module", params=KINDS)
def subject(request):
    return Subject(request.param)


@pytest.fixture(scope="module")
def flow():
    return Subject("flow_prediction")


@pytest.fixture(scope="module")
def diffusion():
    return Subject("epsilon")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def truncated(hand, live):
    """Sampling with the outputs of some steps detached: gradient flows around them, through the scheduler."""
    x = hand.start
    for i in range(hand.num_steps):
        output = hand.predict(x, i)
        x = hand.step(x, i, output if i in live else output.detach())
    return x


@torch.no_grad()
def trajectory(hand):
    """The latents before each step, and the last ones."""
    latents = [hand.start]
    for i in range(hand.num_steps):
        latents.append(hand.step(latents[-1], i, hand.predict(latents[-1], i)))
    return latents


@pytest.mark.parametrize("steps", [1, 3])
def test_draft_k(subject, steps):
    hand = subject.by_hand()
    estimate, ours = subject.run(DraftK(steps))
    x_0 = truncated(hand, range(T - steps, T))
    assert relative(ours, subject.descent(hand.pixels(x_0))) < IN_FLOAT32
    expected = each_contrast(hand.pixels(x_0), tiny.PROMPTS)
    torch.testing.assert_close(estimate.scores, expected.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("draw", "live"), [(2, 4), (3, 2)])
def test_alignprop_is_truncated_where_its_draw_says(subject, draw, live):
    hand = subject.by_hand()
    estimate, ours = subject.run(AlignProp(), draw=draw)
    assert estimate.live_steps == live
    assert relative(ours, subject.descent(hand.pixels(truncated(hand, range(T - live, T))))) < IN_FLOAT32


@pytest.mark.parametrize(("draw", "kept"), [(4, [1, 2, 4]), (15, [0, 2, 3])])
def test_as_released_keeps_steps_one_by_one_and_flows_around_the_others(subject, draw, kept):
    hand = subject.by_hand()
    estimate, ours = subject.run(AsReleased(), draw=draw)
    assert estimate.live_steps == len(kept)
    assert relative(ours, subject.descent(hand.pixels(truncated(hand, kept)))) < IN_FLOAT32


@pytest.mark.parametrize("copies", [1, 3])
def test_draft_lv_is_the_mean_over_renoised_copies_of_the_picture(subject, copies):
    hand = subject.by_hand()
    *_, x_1, x_0 = trajectory(hand)
    total = 0
    for copy in range(-1, copies):
        start = x_1 if copy < 0 else hand.noised(x_0, noise_of(x_0, SEEDS, copy), T - 1)
        total += subject.descent(hand.pixels(hand.step(start, T - 1, hand.predict(start, T - 1))))
    estimate, ours = subject.run(DraftLV(copies))
    assert relative(ours, total / (copies + 1)) < IN_FLOAT32
    expected = each_contrast(hand.pixels(x_0), tiny.PROMPTS).detach()
    torch.testing.assert_close(estimate.scores, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("draw", [0, 1])
def test_refl_is_the_one_step_estimate_at_a_late_step(subject, draw):
    hand, estimator = subject.by_hand(), ReFL(late_steps=4)
    i = estimator.draw(T, generator(draw))
    x_t = trajectory(hand)[i]
    estimate, ours = subject.run(estimator, draw=draw)
    pixels = hand.pixels(hand.clean(x_t, i, hand.predict(x_t, i)))
    assert relative(ours, subject.descent(pixels)) < IN_FLOAT32
    expected = each_contrast(pixels, tiny.PROMPTS).detach()
    torch.testing.assert_close(estimate.scores, expected, rtol=1e-5, atol=1e-5)
    assert (estimate.calls, estimate.live_steps) == (i + 1, 1)


def drtuned(hand, live, end=1):
    """DRTune, algorithm 1: the denoiser's input is detached; at t_min = end the clean estimate ends the sampling."""
    x = hand.start
    for i in range(hand.num_steps - end + 1):
        output = hand.predict(x.detach(), i)
        output = output if i in live else output.detach()
        stops = end > 1 and i == hand.num_steps - end
        x = hand.clean(x, i, output) if stops else hand.step(x, i, output)
    return x


@pytest.mark.parametrize(("draw", "early_stop"), [(0, 1), (1, None), (4, 4)])
def test_drtune(subject, draw, early_stop):
    torch_generator = generator(draw)
    first = int(torch.randint(1, T - 2 + 1, (), generator=torch_generator))  # T - (K - 1) floor(T / K), K = 2
    end = int(torch.randint(1, {None: 2}.get(early_stop, early_stop) + 1, (), generator=torch_generator))
    trained = [T - t for t in (first, first + 2) if t >= end]
    hand = subject.by_hand()
    estimate, ours = subject.run(DRTune(2, early_stop), draw=draw)
    assert relative(ours, subject.descent(hand.pixels(drtuned(hand, trained, end)))) < IN_FLOAT32
    assert (estimate.live_steps, estimate.calls) == (len(trained), T - end + 1)


@pytest.mark.parametrize("late_bias", [0.0, 2.0])
def test_flowbp_sparse_adds_up_its_steps(subject, late_bias):
    estimator = FlowBPSparse(2, late_bias)
    hand, selected = subject.by_hand(), estimator.draw(T, generator(1))
    assert relative(subject.gradient(estimator, draw=1), subject.descent(hand.pixels(drtuned(hand, selected)))) < (
        IN_FLOAT32
    )


@pytest.mark.parametrize("rescale", [0.0, 0.4, 1.0])
def test_flowbp_sparse_integrates_velocities(flow, rescale):
    """Written as in the paper, with uneven weights: ``x_0 = x_T + sum_i w_i v_i``, here those of a shifted schedule."""
    sigmas = [1.0, 0.9, 0.7, 0.6, 0.2]
    hand, selected = flow.by_hand(), FlowBPSparse(2).draw(T, generator(3))
    hand.sigmas = torch.tensor([*sigmas, 0.0]).double()
    weights, latents = hand.sigmas.diff(), trajectory(hand)
    scale = 1 + rescale * (weights.sum() / weights[selected].sum() - 1)
    x_0 = latents[-1]
    for i in selected:
        velocity = hand.predict(latents[i], i)
        x_0 = x_0 + scale * weights[i] * (velocity - velocity.detach())
    ours = flow.gradient(FlowBPSparse(2, rescale=rescale), draw=3, sigmas=sigmas)
    assert relative(ours, flow.descent(hand.pixels(x_0))) < IN_FLOAT32


@pytest.mark.parametrize(("discount", "floor", "draw"), [(0.3, 0.1, 5), (0.0, 1e-9, 4), (1.0, 0.02, 2)])
def test_leapalign(subject, discount, floor, draw):
    hand = subject.by_hand()
    k, j = leapalign.draw(T, generator(draw))
    latents = trajectory(hand)

    def connected(leapt, real):
        distances.append((real - leapt).detach().abs().mean((1, 2, 3)))
        return leapt + (real - leapt).detach()

    distances = []
    x_j = connected(hand.leap(latents[k], k, j, hand.predict(latents[k], k)), latents[j])
    received = discount * x_j + (1 - discount) * x_j.detach()
    x_0 = connected(hand.clean(x_j, j, hand.predict(received, j)), latents[-1])
    weights = 1 / sum(distance.clamp(min=floor) for distance in distances)
    estimate, ours = subject.run(LeapAlign(discount, floor), draw=draw)
    pixels = hand.pixels(x_0)
    assert relative(ours, subject.descent(pixels, weights)) < IN_FLOAT32
    expected = each_contrast(pixels, tiny.PROMPTS).detach()  # of the real picture
    torch.testing.assert_close(estimate.scores, expected, rtol=1e-5, atol=1e-5)


def same_draw(first, second):
    """Seeds with which two estimators draw the same live steps."""
    wanted = {str(first(generator(seed))): seed for seed in range(20)}
    return next((wanted[str(drawn)], seed) for seed in range(20) if str(drawn := second(generator(seed))) in wanted)


def test_a_window_of_all_steps_is_the_full_gradient(subject):
    full = subject.gradient(AlignProp(All()))
    for estimator in (DraftK(T), AsReleased(low=0, high=0)):
        assert relative(subject.gradient(estimator), full) < 1e-12
    assert relative(subject.gradient(DraftK(2)), subject.gradient(AlignProp(Last(2)))) < 1e-12


def test_refl_at_the_last_step_is_draft_1_where_the_chain_ends_in_a_clean_picture(subject):
    difference = relative(subject.gradient(ReFL(late_steps=1)), subject.gradient(DraftK(1)))
    assert difference > 1e-4 if subject.kind == "v_prediction" else difference < IN_FLOAT32


def test_drtune_and_flowbp_sparse_coincide(subject):
    everywhere = subject.gradient(DRTune(T, early_stop=1))
    assert relative(subject.gradient(FlowBPSparse(T)), everywhere) < 1e-10
    draws = same_draw(lambda g: DRTune(1, 1).draw(T, g).live, lambda g: FlowBPSparse(1).draw(T, g))
    one, other = subject.gradient(DRTune(1, 1), draw=draws[0]), subject.gradient(FlowBPSparse(1), draw=draws[1])
    assert relative(one, other) < 1e-10
    assert relative(one, everywhere) > 1e-2


def test_a_chain_of_one_step_leaves_no_choice(subject):
    expected = subject.gradient(DraftK(1), num_steps=1)
    for estimator in (DRTune(), FlowBPSparse(), AlignProp(), AsReleased(high=0)):
        assert relative(subject.gradient(estimator, num_steps=1), expected) < 1e-10


def test_the_two_leaps_of_a_chain_of_two_steps_are_its_steps(subject):
    """Up to the weight, which is 1 / (tau + tau) where leaps and steps agree."""
    leaps = subject.gradient(LeapAlign(discount=1.0, similarity_floor=0.5), num_steps=2)
    difference = relative(leaps, subject.gradient(DraftK(2), num_steps=2))
    assert difference > 1e-4 if subject.kind == "v_prediction" else difference < IN_FLOAT32


EACH = {
    "align-prop": (AlignProp(Last(3)), T, 2),
    "as-released": (AsReleased(), T, 2),
    "draft-k": (DraftK(2), T, 2),
    "draft-lv": (DraftLV(3), T + 3, 8),
    "refl": (ReFL(late_steps=1), T, 2),
    "refl-early": (ReFL(late_steps=T), 5, 2),
    "drtune": (DRTune(2, early_stop=1), T, 2),
    "flowbp-sparse": (FlowBPSparse(3), T + 2, 2),  # the last selected step keeps its activations
    "leapalign": (LeapAlign(), T + 2, 2),
}


@pytest.mark.parametrize("name", EACH)
def test_the_denoiser_is_called_as_often_as_it_says(subject, name, monkeypatch):
    estimator, calls, num_scored = EACH[name]
    (denoiser,) = spec_of(subject.pipeline).denoisers_of(subject.pipeline)
    forward, seen = denoiser.forward, []
    monkeypatch.setattr(denoiser, "forward", lambda *args, **kwargs: (seen.append(1), forward(*args, **kwargs))[1])
    scored = []

    def reward(images, prompts):
        scored.extend(prompts)
        return each_contrast(images, prompts)

    estimate, _ = subject.run(estimator, reward=reward)
    assert estimate.calls == len(seen) == calls
    assert estimate.num_scored == len(scored) == num_scored
    assert estimate.num_steps == T


@pytest.mark.parametrize("mode", ["step", "nested"])
@pytest.mark.parametrize("name", [name for name in EACH if name != "flowbp-sparse"])
def test_checkpointing_changes_no_gradient(diffusion, name, mode):
    estimator = EACH[name][0]
    expected = diffusion.gradient(estimator)
    assert relative(diffusion.gradient(replace(estimator, checkpointing=mode)), expected) < 1e-10


@pytest.mark.parametrize(
    ("estimator", "drawn"),
    [
        (AsReleased(low=T - 1), lambda g: AsReleased(low=T - 1).kept(T, g)),
        (DRTune(1, 4), lambda g: DRTune(1, 4).draw(T, g).live),
    ],
    ids=["as-released", "drtune"],
)
def test_a_draw_that_keeps_no_step_trains_nothing(subject, estimator, drawn):
    draw = next(seed for seed in range(50) if not drawn(generator(seed)))
    estimate, ours = subject.run(estimator, draw=draw)
    assert not ours.any() and estimate.live_steps == 0
    if isinstance(estimator, AsReleased):
        hand = subject.by_hand()
        expected = each_contrast(hand.pixels(trajectory(hand)[-1]), tiny.PROMPTS).detach()
        torch.testing.assert_close(estimate.scores, expected, rtol=1e-5, atol=1e-5)


@pytest.fixture
def folder(tmp_path):
    """Three pictures that the tiny pipelines could have made."""
    for place, name in enumerate(["a_bee", "a_cat", "an_ox"]):
        pixels = torch.rand(16, 16, 3, generator=generator(place)) * 255
        Image.fromarray(pixels.to(torch.uint8).numpy()).save(tmp_path / f"{name}.png")
    return tmp_path


def test_refl_pretrains_on_pictures(subject, folder):
    """The part that pictures add to the gradient, against the loss of diffusion training written by hand."""
    plain, reward_alone = subject.run(ReFL(late_steps=1))
    estimate, both = subject.run(ReFL(late_steps=1, images=str(folder), pretraining_weight=20.0))
    names = ["a_bee", "a_cat", "an_ox"]
    seeds = [distributed.derive_seed(seed, len(names)) for seed in SEEDS]
    chosen = [names[seed % len(names)] for seed in seeds]
    pictures = torch.stack([torch.tensor(np.array(Image.open(folder / f"{name}.png"))) for name in chosen])
    vae = subject.pipeline.vae
    with torch.no_grad():
        latents = vae.encode(pictures.permute(0, 3, 1, 2).double() / 127.5 - 1).latent_dist.mode()
    x_0 = (latents - (vae.config.shift_factor or 0)) * vae.config.scaling_factor
    loss = subject.by_hand([name.replace("_", " ") for name in chosen]).denoising_loss(x_0, seeds)
    expected = gradient(20 * WEIGHT * loss.sum(), subject.adapter)
    assert relative(both - reward_alone, expected) < IN_FLOAT32
    assert estimate.facts["pretraining_loss"] == pytest.approx(loss.mean().item(), rel=1e-5)
    assert estimate.calls == plain.calls + T and not plain.facts


@pytest.mark.parametrize("name", ["Flux", "DDPM"])
def test_pictures_are_refused_where_latents_are_not_the_decoders(name, folder):
    """The first packs them, the second has none."""
    row = next(row for row in ROWS if row.name == name)
    batch = MicroBatch(0, row.prompts, SEEDS, generator())
    estimator = ReFL(images=str(folder))
    with pytest.raises(ValueError, match=r"images: the latents of \w+Pipeline are not its decoder's.*images out"):
        estimator(Sampler(row.build(torch.float32), row.call), as_weighted_sum(each_contrast), batch, WEIGHT)


NO_ESTIMATE = "does not say how a clean picture follows from one denoising step"


@pytest.mark.parametrize(
    "estimator", [ReFL(late_steps=1), DRTune(1, 4), LeapAlign()], ids=["refl", "drtune", "leapalign"]
)
@pytest.mark.parametrize("scheduler", [HeunDiscreteScheduler, EDMEulerScheduler])
def test_schedulers_without_a_clean_estimate_are_refused(estimator, scheduler):
    subject = Subject("epsilon")
    subject.pipeline.scheduler = scheduler()
    with pytest.raises(ValueError, match=f"^{scheduler.__name__} {NO_ESTIMATE}, .*use DDIMScheduler"):
        subject.run(estimator, draw=2)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: AsReleased(low=-1), "low=-1 and high=None need 0 <= low <= high"),
        (lambda: AsReleased(low=3, high=2), "low=3 and high=2 need 0 <= low <= high"),
        (lambda: DraftK(0), "steps=0 needs at least 1: no live step"),
        (lambda: DraftLV(0), "copies=0 needs at least 1; without copies this is draft-k with steps=1"),
        (lambda: ReFL(late_steps=0), "late_steps=0 needs at least 1"),
        (lambda: ReFL(images="/nowhere"), "images='/nowhere' is no folder"),
        (lambda: DRTune(0), "steps=0 needs at least 1: no trained step"),
        (lambda: DRTune(1, 0), "early_stop=0 needs at least 1"),
        (lambda: FlowBPSparse(0), "steps=0 needs at least 1: no selected step"),
        (lambda: FlowBPSparse(rescale=1.5), "rescale=1.5 needs 0 <= rescale <= 1"),
        (lambda: FlowBPSparse(rescale=-0.1), "rescale=-0.1 needs 0 <= rescale <= 1"),
        (lambda: LeapAlign(discount=-0.5), "discount=-0.5 needs 0 <= discount <= 1"),
        (lambda: LeapAlign(discount=2), "discount=2 needs 0 <= discount <= 1"),
        (lambda: LeapAlign(similarity_floor=0), "similarity_floor=0 needs to be above 0"),
    ],
)
def test_settings_that_can_never_fit_are_refused_at_once(make, sentence):
    with pytest.raises(ValueError, match=f"^{sentence}"):
        make()


@pytest.mark.parametrize(
    ("estimator", "num_steps", "sentence"),
    [
        (DraftK(6), 5, "truncation.steps=6 needs 1 <= steps <= 5, the number of denoising steps"),
        (AsReleased(low=5), 5, "low=5 needs low < 5, the number of denoising steps"),
        (ReFL(late_steps=6), 5, "late_steps=6 needs at most 5, the number of denoising steps"),
        (DRTune(early_stop=6), 5, "early_stop=6 needs at most 5, the number of denoising steps"),
        (DraftLV(), 1, "draft-lv re-noises what comes before the last of at least 2 denoising steps"),
        (LeapAlign(), 1, "leapalign leaps between two of at least 2 denoising steps"),
        (FlowBPSparse(rescale=0.1), 5, "flowbp-sparse with rescale needs flow matching, and DDIMScheduler is of"),
    ],
)
def test_settings_that_do_not_fit_the_chain_are_refused(diffusion, estimator, num_steps, sentence):
    with pytest.raises(ValueError, match=f"^{sentence}"):
        diffusion.run(estimator, num_steps)


def frequencies(draw, count=6000):
    """How often each result is drawn, of all draws."""
    torch_generator = generator()
    counts = Counter(draw(torch_generator) for _ in range(count))
    return {drawn: number / count for drawn, number in counts.items()}


def likely(measured, probability, count=6000):
    """Whether a frequency is within 4 deviations of what is expected."""
    return abs(measured - probability) < 4 * (probability * (1 - probability) / count) ** 0.5


def test_as_released_keeps_each_step_with_its_own_probability():
    measured = frequencies(lambda g: tuple(AsReleased().kept(4, g)))

    def share(*steps):
        return sum(part for kept, part in measured.items() if set(steps) <= set(kept))

    for i in range(4):
        assert likely(share(i), (i + 1) / 5)
        for j in range(i):
            assert likely(share(i, j), (i + 1) / 5 * (j + 1) / 5)  # independently of one another
    assert likely(measured[()], 24 / 625)  # 4/5 3/5 2/5 1/5
    late = frequencies(lambda g: tuple(AsReleased(low=2, high=3).kept(4, g)))
    assert late.keys() == {(3,), (2, 3)} and likely(late[3,], 0.5)


def test_drtune_draws_an_even_comb_and_a_stop():
    plans = frequencies(lambda g: (tuple((plan := DRTune(3, 4).draw(10, g)).live), len(plan.held), plan.input_gradient))
    expected = Counter()
    for first in range(1, 5):  # of 10 - 2 floor(10 / 3), t counted from the picture
        for end in range(1, 5):
            live = tuple(10 - t for t in (first, first + 3, first + 6) if t >= end)
            expected[live, end - 1, 0.0] += 1 / 16
    assert plans.keys() == expected.keys()
    assert all(likely(plans[drawn], part) for drawn, part in expected.items())
    assert {held for _, held in frequencies(lambda g: ("", len(DRTune().draw(10, g).held)), 200)} == {0, 1, 2, 3}
    assert sorted(DRTune(99, 1).draw(4, generator()).live) == [0, 1, 2, 3]
    assert DRTune(3, 4).draw(10, generator(1)).held == range(10 - len(DRTune(3, 4).draw(10, generator(1)).held), 10)


@pytest.mark.parametrize(("late", "num_steps", "steps"), [(None, 8, (6, 7)), (None, 5, (3, 4)), (3, 5, (2, 3, 4))])
def test_refl_draws_a_late_step(late, num_steps, steps):
    measured = frequencies(lambda g: ReFL(late).draw(num_steps, g))
    assert set(measured) == set(steps) and all(likely(part, 1 / len(steps)) for part in measured.values())


def test_flowbp_sparse_draws_without_replacement_and_rather_late():
    pairs = frequencies(lambda g: tuple(FlowBPSparse(2).draw(4, g)))
    assert set(pairs) == {(i, j) for j in range(4) for i in range(j)}
    assert all(likely(part, 1 / 6) for part in pairs.values())
    ones = frequencies(lambda g: tuple(FlowBPSparse(1, late_bias=2.0).draw(3, g)))
    assert all(likely(ones[i,], (i + 1) ** 2 / 14) for i in range(3))
    assert FlowBPSparse(9).draw(4, generator()) == [0, 1, 2, 3]


def test_leapalign_draws_two_different_steps_the_noisier_first():
    pairs = frequencies(lambda g: leapalign.draw(4, g))
    assert set(pairs) == {(i, j) for j in range(4) for i in range(j)}
    assert all(likely(part, 1 / 6) for part in pairs.values())
