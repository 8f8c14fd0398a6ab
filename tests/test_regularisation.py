"""Regularisers: against loops written by hand, finite differences, the pipeline without adapter, and the formulas."""

import copy
from dataclasses import replace

import pytest
import torch
from diffusers import HeunDiscreteScheduler
from peft import LoraConfig

import tiny
from alignprop.adapters import Adapter, Full
from alignprop.config import ConfigError, load_config
from alignprop.config.building import build
from alignprop.estimators import (
    DDPO,
    RWR,
    AlignProp,
    AsReleased,
    DraftK,
    DraftLV,
    DRTune,
    FlowBPSparse,
    LeapAlign,
    MicroBatch,
    ReFL,
    Step,
    leapalign,
)
from alignprop.estimators.denoising_loss import noise_of
from alignprop.regularisation import Regularisation, Regulariser
from alignprop.rewards import as_weighted_sum
from alignprop.rollout import Sampler
from alignprop.seams import CHECKPOINTING_MODES
from alignprop.steps import Plan
from alignprop.trainer import Optimizer
from alignprop.truncation import All, Last, Uniform
from test_gradient_estimators import (
    IN_FLOAT32,
    KINDS,
    SEEDS,
    WEIGHT,
    DiffusionByHand,
    FlowByHand,
    Subject,
    T,
    each_contrast,
    generator,
    trajectory,
)
from test_refusals import _Overwriting
from test_rollout import gradient, perturbed, relative, slope, some_direction
from test_trainer import callbacks, metrics_of_resumed, trainer
from test_zoo import each, made

KL, L2 = 3.0, 5.0
"""Weights with which the penalties' gradients are of the size of the reward's."""
BOTH = Regularisation(kl=KL, l2=L2)


class Regularised(Subject):
    """A tiny pipeline in float64 with an adapter that has an effect, and the base pipeline without one."""

    def __init__(self, kind):
        super().__init__(kind)
        plain = Subject.__new__(Subject)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("test_gradient_estimators.perturbed", lambda pipeline: None)
            plain.__init__(kind)
        self.plain = plain.pipeline

    def base_by_hand(self):
        return (FlowByHand if self.kind == "flow_prediction" else DiffusionByHand)(self.plain, T)

    def regulariser(self, settings, weight=WEIGHT):
        return Regulariser(settings, self.adapter.disabled, weight)

    def regularised(self, estimator, settings, draw=0, weight=WEIGHT, **call):
        """What an estimator returns in a step that is regularised, and the gradient."""
        values = list(self.adapter.parameters.values())
        for value in values:
            value.grad = torch.zeros_like(value)
        batch = MicroBatch(0, tiny.PROMPTS, SEEDS, generator(draw))
        step = Step(
            Sampler(self.pipeline, self.call() | call),
            as_weighted_sum(each_contrast),
            lambda work: [work(batch)],
            1,
            lambda: weight,
            lambda weight: self.regulariser(settings, weight),
        )
        ((estimate,),) = list(estimator.updates(step))
        return estimate, torch.cat([value.grad.flatten() for value in values])


@pytest.fixture(scope="module", params=KINDS)
def subject(request):
    return Regularised(request.param)


@pytest.fixture(scope="module")
def diffusion():
    return Regularised("epsilon")


@pytest.fixture(scope="module")
def flow():
    return Regularised("flow_prediction")


# The penalties


class PenaltyByHand:
    """Adds up both penalties along a sampling made by hand."""

    def __init__(self, subject):
        self.hand, self.base, self.kl, self.l2 = subject.by_hand(), subject.base_by_hand(), [], []

    def predict(self, x, i):
        """The guided prediction; ``x`` may carry gradient, through which the base model is not differentiated."""
        both = torch.cat([x, x])
        with torch.no_grad():
            theirs, guided = self.base.denoise(both, i), self.base.predict(x, i)
        self.l2.append((self.hand.denoise(both, i) - theirs).square().mean((1, 2, 3)).view(2, 2).mean(0))
        output = self.hand.predict(x, i)
        moved = self.hand.step(x, i, output) - self.hand.step(x, i, guided)
        self.kl.append(moved.square().mean((1, 2, 3)) / (2 * self.variance(i)))
        return output

    def variance(self, i):
        """Of the forward process over step i, from the next step's latents to these."""
        alphas, sigmas = self.hand.alphas, self.hand.sigmas
        if i == T - 1:
            return sigmas[i] ** 2
        return sigmas[i] ** 2 - (alphas[i] / alphas[i + 1] * sigmas[i + 1]) ** 2

    def total(self):
        return KL * sum(self.kl) + L2 * sum(self.l2) / len(self.l2)

    def descent(self, subject, x_0, weights=1.0):
        """The gradient of the loss of pictures made by hand; their penalty is this one's."""
        scores = each_contrast(self.hand.pixels(x_0), tiny.PROMPTS)
        return gradient(-(WEIGHT * weights * (scores - self.total())).sum(), subject.adapter)

    def matches(self, facts):
        for name, values in (("kl", sum(self.kl)), ("l2", sum(self.l2) / len(self.l2))):
            assert facts[name] == pytest.approx(values.mean().item(), rel=1e-4)
            assert facts[name] > 1e-6


@pytest.mark.parametrize("steps", [1, 3, T])
def test_reward_minus_penalty_along_a_window(subject, steps):
    by_hand = PenaltyByHand(subject)
    x = by_hand.hand.start
    for i in range(T):
        live = i >= T - steps
        output = by_hand.predict(x, i) if live else by_hand.hand.predict(x, i).detach()
        x = by_hand.hand.step(x, i, output)
    estimate, ours = subject.regularised(DraftK(steps), BOTH)
    expected = by_hand.descent(subject, x)
    assert relative(ours, expected) < IN_FLOAT32
    by_hand.matches(estimate.facts)
    assert relative(subject.gradient(DraftK(steps)), expected) > 0.05  # the penalty's part is there to be seen
    assert estimate.calls == T + steps


def test_the_penalty_is_cut_where_the_reward_is(subject):
    """DRTune: spread steps, inputs cut, stopped early; what is held afterwards is compared with nothing."""
    estimator = DRTune(2, early_stop=3)
    plans = {draw: estimator.draw(T, generator(draw)) for draw in range(50)}
    draw, plan = next((draw, plan) for draw, plan in plans.items() if len(plan.held) and len(plan.live) == 2)
    by_hand = PenaltyByHand(subject)
    x, last = by_hand.hand.start, T - 1 - len(plan.held)
    for i in range(last + 1):
        output = by_hand.predict(x.detach(), i) if i in plan.live else by_hand.hand.predict(x, i).detach()
        x = (by_hand.hand.clean if i == last else by_hand.hand.step)(x, i, output)
    estimate, ours = subject.regularised(estimator, BOTH, draw)
    assert relative(ours, by_hand.descent(subject, x)) < IN_FLOAT32
    by_hand.matches(estimate.facts)
    assert estimate.calls == last + 1 + 2


def test_the_penalty_is_weighted_as_the_reward_is(subject):
    """LeapAlign: its pictures have weights of their own, and its second call gets a part of the gradient."""
    draw, discount = 2, 0.4
    by_hand, (k, j) = PenaltyByHand(subject), leapalign.draw(T, generator(draw))
    hand, latents, distances = by_hand.hand, trajectory(by_hand.hand), []

    def connected(leapt, real):
        distances.append((real - leapt).detach().abs().mean((1, 2, 3)))
        return leapt + (real - leapt).detach()

    x_j = connected(hand.leap(latents[k], k, j, by_hand.predict(latents[k], k)), latents[j])
    received = discount * x_j + (1 - discount) * x_j.detach()
    x_0 = connected(hand.clean(x_j, j, by_hand.predict(received, j)), latents[-1])
    image_weights = 1 / sum(distance.clamp(min=0.02) for distance in distances)
    estimate, ours = subject.regularised(LeapAlign(discount, 0.02), BOTH, draw)
    assert relative(ours, by_hand.descent(subject, x_0, image_weights)) < IN_FLOAT32
    by_hand.matches(estimate.facts)


def test_the_penalty_is_the_mean_over_copies(subject):
    """DRaFT-LV: the picture and its re-noised copies have each their own."""
    copies, hand = 2, subject.by_hand()
    *_, x_1, x_0 = trajectory(hand)
    total, penalties = 0, []
    for copy_of in range(-1, copies):
        by_hand = PenaltyByHand(subject)
        x = x_1 if copy_of < 0 else hand.noised(x_0, noise_of(x_0, SEEDS, copy_of), T - 1)
        total += by_hand.descent(subject, hand.step(x, T - 1, by_hand.predict(x, T - 1)))
        penalties.append((by_hand.kl[0].mean().item(), by_hand.l2[0].mean().item()))
    estimate, ours = subject.regularised(DraftLV(copies), BOTH)
    assert relative(ours, total / (copies + 1)) < IN_FLOAT32
    kl, l2 = (sum(values) / (copies + 1) for values in zip(*penalties, strict=True))
    assert (estimate.facts["kl"], estimate.facts["l2"]) == pytest.approx((kl, l2), rel=1e-4)
    assert estimate.calls == T + copies + copies + 1


def test_the_gradient_is_that_of_finite_differences(subject, monkeypatch):
    """With what the base model said held where it is, as the definition has it."""
    said = []
    reference = Regulariser.reference

    def once(*args, **kwargs):
        said[:] = said or [reference(*args, **kwargs)]
        return said[0]

    monkeypatch.setattr(Regulariser, "reference", once)

    def objective():
        sampler = Sampler(subject.pipeline, subject.call(), regulariser=subject.regulariser(BOTH))
        rollout = sampler.rollout(tiny.PROMPTS, SEEDS)
        return (each_contrast(rollout.pixels, tiny.PROMPTS) - rollout.penalty).sum()

    exact = gradient(objective(), subject.adapter)
    direction = some_direction(exact)
    measured = slope(objective, subject.adapter, direction)
    coarse = subject.kind == "flow_prediction"  # whose scheduler rounds the latents
    assert (exact @ direction).item() == pytest.approx(measured, rel=5e-3 if coarse else 1e-5)


def test_a_noisy_sampler_is_measured_by_its_own_noise(diffusion):
    """DDIM with eta 1 (arXiv 2010.02502, eq. 16), against torch's own divergence of two Gaussians."""
    by_hand, seen = PenaltyByHand(diffusion), []
    sampler = Sampler(diffusion.pipeline, diffusion.call() | {"eta": 1.0})
    sampler.rollout(tiny.PROMPTS, SEEDS, on_step=lambda t: seen.append(t.arguments["sample"].detach()))
    hand, total = by_hand.hand, 0
    for i, x in enumerate(seen[:-1]):
        variance = (hand.sigmas[i + 1] / hand.sigmas[i]) ** 2 * (1 - (hand.alphas[i] / hand.alphas[i + 1]) ** 2)
        normals = [
            torch.distributions.Normal(
                hand.alphas[i + 1] * hand.clean(x, i, noise) + (hand.sigmas[i + 1] ** 2 - variance).sqrt() * noise,
                variance.sqrt(),
            )
            for noise in (hand.predict(x, i), by_hand.base.predict(x, i))
        ]
        total += torch.distributions.kl_divergence(*normals).mean().item()
    by_hand.predict(seen[-1], T - 1)  # the last step draws nothing
    estimate, _ = diffusion.regularised(AlignProp(All()), Regularisation(kl=1.0), eta=1.0)
    assert estimate.facts["kl"] == pytest.approx(total + by_hand.kl[0].mean().item(), rel=1e-4)


def test_where_nothing_is_drawn_the_divergence_has_a_closed_form(flow):
    """Euler's steps of flow matching: each has its share of the squared difference, and the last one is finite."""
    sampler = Sampler(flow.pipeline, flow.call() | {"guidance_scale": 1.0})  # so that prediction and output are one
    for live in range(T):
        regulariser = flow.regulariser(Regularisation(kl=1.0, l2=1.0))
        replace(sampler, regulariser=regulariser).rollout(tiny.PROMPTS, SEEDS, plan=lambda _, live=live: Plan([live]))
        t, s = 1 - live / T, 1 - (live + 1) / T
        variance = t**2 if live == T - 1 else t**2 - ((1 - t) / (1 - s) * s) ** 2
        expected = (t - s) ** 2 / (2 * variance) * regulariser.totals["l2"]
        assert torch.allclose(regulariser.totals["kl"], expected, rtol=1e-3)


@pytest.mark.parametrize("estimator", [AlignProp(Last(3)), LeapAlign(), DraftLV(1)], ids=["window", "leaps", "copies"])
def test_every_checkpointing_mode_gives_the_same_gradient(subject, estimator):
    settings = replace(BOTH, max_step_grad_norm=0.3)
    results = {
        mode: subject.regularised(replace(estimator, checkpointing=mode), settings) for mode in CHECKPOINTING_MODES
    }
    expected, first = results["none"]
    for mode, (estimate, found) in results.items():
        assert torch.equal(found, first), mode
        assert (estimate.facts, estimate.calls) == (expected.facts, expected.calls)


def test_a_fresh_adapter_has_no_penalty_and_no_gradient_of_one():
    plain, regularised = (trainer(dropout=0.5, regularisation=settings) for settings in (Regularisation(), BOTH))
    for run in (plain, regularised):
        for _ in run._updates(run.descent()):
            run.gradient = torch.cat([p.grad.flatten() for p in run.parameters.values() if p.grad is not None])
            run.adamw.zero_grad()
    assert torch.equal(plain.gradient, regularised.gradient) and plain.gradient.any()
    metrics = regularised.train_step()
    assert (metrics["kl"], metrics["l2"]) == (0, 0)
    metrics = regularised.train_step()
    assert metrics["kl"] > 0 and metrics["l2"] > 0
    assert not {"kl", "l2", "step_clip_fraction"} & plain.train_step().keys()


# The reference


def with_adapter_of_the_user(pipeline):
    torch.manual_seed(7)
    config = LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False, lora_dropout=0.5)
    pipeline.unet.add_adapter(config, adapter_name="own")
    pipeline.unet.eval()
    return pipeline


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_the_reference_is_what_the_users_pipeline_predicts(eta):
    """To the last bit, with the adapter that it came with, and none of ours, nor its dropout."""
    plain, pipeline = (with_adapter_of_the_user(tiny.stable_diffusion()) for _ in range(2))
    adapter = perturbed(pipeline, dropout=0.5)
    adapter.train()
    flags = {name: value.requires_grad for name, value in pipeline.unet.named_parameters()}
    given, references, reference = [], [], Regulariser.reference
    regulariser = Regulariser(BOTH, adapter.disabled, 1.0)
    regulariser.reference = lambda *args, **kwargs: (
        references.append(reference(regulariser, *args, **kwargs)) or references[0]
    )
    hook = pipeline.unet.register_forward_pre_hook(lambda _, *call: given.append(copied(call)), with_kwargs=True)
    sampler = Sampler(pipeline, {**tiny.CALL, "eta": eta}, regulariser=regulariser)
    rollout = sampler.rollout(tiny.PROMPTS, [0, 1], live_steps=3)
    hook.remove()
    ((base, calls),) = references
    assert (calls, rollout.calls, sorted(base)) == (3, 4 + 3, [1, 2, 3])
    for step, prediction in base.items():
        args, kwargs = given[step]
        with torch.no_grad():
            expected = plain.unet(*args, **kwargs)[0]
            negative, positive = expected.chunk(2)
            theirs = negative + 5.0 * (positive - negative)
        assert torch.equal(prediction.outputs[0], expected)
        assert torch.equal(prediction.seen.arguments["model_output"], theirs)
        assert not prediction.outputs[0].requires_grad
    assert flags == {name: value.requires_grad for name, value in pipeline.unet.named_parameters()}
    assert "own" in next(adapter._layers()).active_adapters


def test_the_reference_has_the_text_encoder_of_the_users_pipeline():
    plain, pipeline = tiny.stable_diffusion(), tiny.stable_diffusion()
    adapter, said = perturbed(pipeline, text_encoders=True), []
    hook = plain.unet.register_forward_hook(lambda module, args, output: said.append(output[0]))
    Sampler(plain, tiny.CALL).sample(tiny.PROMPTS, [0, 1])
    hook.remove()
    found, regulariser = [], Regulariser(BOTH, adapter.disabled, 1.0)
    penalty = regulariser.penalty
    regulariser.penalty = lambda tuned, base, *rest: (found.append(base), penalty(tuned, base, *rest))[1]
    Sampler(pipeline, tiny.CALL, regulariser=regulariser).rollout(tiny.PROMPTS, [0, 1])
    assert torch.equal(found[0].outputs[0], said[0])  # of the first step, whose latents are the same
    assert not torch.equal(found[1].outputs[0], said[1])
    assert not any(prediction.outputs[0].requires_grad for prediction in found)


def copied(value):
    """Copies, since some pipelines write into their latents afterwards; detached, as copies must be."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {name: copied(each) for name, each in value.items()}
    return type(value)(map(copied, value)) if isinstance(value, (list, tuple)) else copy.copy(value)


@each(lambda row: row.id in ("wan-2.2", "z-image", "cogview4", "stable-diffusion-inpainting", "kandinsky-5", "lcm"))
def test_l2_of_every_kind_of_pipeline_is_that_of_its_own_calls(row, monkeypatch):
    """Two denoisers, lists of tensors, two calls a step, latents that are blended or overwritten, noise."""
    adapter, sampler = made(row)
    calls, regulariser = [], Regulariser(Regularisation(l2=1.0), adapter.disabled, 1.0)
    for denoiser in adapter.spec.denoisers_of(sampler.pipeline):
        forward = denoiser.forward

        def spy(*args, forward=forward, **kwargs):
            calls.append((forward, copied(args), copied(kwargs)))
            return forward(*args, **kwargs)

        monkeypatch.setattr(denoiser, "forward", spy)
    rollout = replace(sampler, regulariser=regulariser).rollout(row.prompts, SEEDS, live_steps=2)
    live = rollout.live_calls
    assert rollout.calls == len(calls) and live == 2 * row.calls
    tuned = calls[-2 * live : -live]
    distances = []
    for forward, args, kwargs in tuned:
        with torch.no_grad():
            ours = rows(forward(*args, **kwargs))
            with adapter.disabled():
                theirs = rows(forward(*args, **kwargs))
        distances.append((ours - theirs).square().flatten(1).mean(1).view(-1, 2).mean(0))
    torch.testing.assert_close(rollout.penalty.detach(), torch.stack(distances).mean(0), rtol=1e-4, atol=0)


def rows(output):
    return output[0] if isinstance(output[0], torch.Tensor) else torch.stack(list(output[0]))


def test_latents_that_are_overwritten_are_compared_as_they_were(diffusion, monkeypatch):
    """Some schedulers write the next latents into the memory of the last ones."""

    def penalty():
        sampler = Sampler(diffusion.pipeline, diffusion.call(), regulariser=diffusion.regulariser(Regularisation(l2=1)))
        return sampler.rollout(tiny.PROMPTS, SEEDS, live_steps=3).penalty.detach()

    expected = penalty()
    monkeypatch.setattr(diffusion.pipeline, "scheduler", _Overwriting.from_config(diffusion.pipeline.scheduler.config))
    assert torch.equal(penalty(), expected)


def test_what_the_reference_draws_shifts_no_stream():
    """A pipeline that draws from torch's own stream in every call draws the same with a penalty as without."""
    states = []
    for settings in (Regularisation(), BOTH):
        pipeline = tiny.stable_diffusion()
        adapter, forward = perturbed(pipeline), pipeline.unet.forward
        pipeline.unet.forward = lambda *args, forward=forward, **kwargs: (torch.rand(1), forward(*args, **kwargs))[1]
        regulariser = Regulariser(settings, adapter.disabled, 1.0) if settings.active else None
        sampler = Sampler(pipeline, {**tiny.CALL, "eta": 1.0}, regulariser=regulariser)
        torch.manual_seed(0)
        pixels = [sampler.rollout(tiny.PROMPTS, [0, 1]).pixels for _ in range(2)]
        states.append((torch.get_rng_state(), pixels[1]))
    assert torch.equal(states[0][0], states[1][0])
    assert torch.equal(states[0][1], states[1][1])


def test_pictures_of_a_first_step_are_those_of_a_run_without():
    scores = []
    for settings in (Regularisation(), replace(BOTH, max_step_grad_norm=0.1)):
        run = trainer(dropout=0.3, estimator=DraftLV(2), regularisation=settings)
        for parameter in run.parameters.values():
            parameter.data.add_(0.05)
        (estimates,) = run._updates(run.descent())
        scores.append(torch.cat([estimate.scores for estimate in estimates]))
    assert torch.equal(*scores)


# The bound of each step's gradient


def bounded_by_hand(subject, limit, scale=1.0):
    """Backpropagation step by step, cut to the bound at the latents that each step gives, and how often it was."""
    hand, values = subject.by_hand(), list(subject.adapter.parameters.values())
    latents = trajectory(hand)
    x = latents[-1].requires_grad_()
    (arriving,) = torch.autograd.grad(-each_contrast(hand.pixels(x), tiny.PROMPTS).sum(), x)
    total, norms = 0, []
    for i in reversed(range(T)):
        norm = arriving.flatten(1).norm(dim=1)
        norms.append(norm)
        arriving = arriving * (limit / norm).clamp(max=1).view(-1, 1, 1, 1)
        assert (arriving.flatten(1).norm(dim=1) <= limit * (1 + 1e-9)).all()
        x = latents[i].detach().requires_grad_()
        *parts, arriving = torch.autograd.grad(
            hand.step(x, i, hand.predict(x, i)), [*values, x], arriving, allow_unused=True
        )
        total = total + torch.cat(
            [torch.zeros(v.numel()).double() if p is None else p.flatten() for p, v in zip(parts, values, strict=True)]
        )
    return scale * total, torch.stack(norms)


def test_the_gradient_that_arrives_at_each_step_is_bounded_for_each_picture(subject):
    _, free = bounded_by_hand(subject, 1e9)
    limit = 1.01 * free.median().item()
    expected, norms = bounded_by_hand(subject, limit, WEIGHT)
    over = (norms > limit).double()
    assert 0 < over.mean() < 1 and (over[:, 0] != over[:, 1]).any()
    estimate, ours = subject.regularised(AlignProp(All()), Regularisation(max_step_grad_norm=limit))
    assert relative(ours, expected) < IN_FLOAT32
    assert relative(subject.gradient(AlignProp(All())), expected) > 0.05
    assert estimate.facts["step_clip_fraction"] == pytest.approx(over.mean().item())
    assert estimate.calls == T


def test_the_bound_knows_nothing_of_the_batchs_weight(diffusion):
    settings = Regularisation(max_step_grad_norm=0.3)
    estimate, once = diffusion.regularised(AlignProp(All()), settings, weight=1.0)
    other, scaled = diffusion.regularised(AlignProp(All()), settings, weight=2.0**16)
    assert torch.equal(scaled, once * 2**16)
    assert 0 < estimate.facts["step_clip_fraction"] == other.facts["step_clip_fraction"]
    nothing, zero = diffusion.regularised(AlignProp(All()), settings, weight=0.0)
    assert not zero.any() and nothing.facts["step_clip_fraction"] == 0


def test_the_bound_knows_nothing_of_batch_and_accumulation():
    found = []
    for batch_size, accumulation in ((4, 1), (2, 2), (1, 4)):
        run = trainer(
            dropout=0.0,
            batch_size=batch_size,
            accumulation=accumulation,
            estimator=AlignProp(All()),
            regularisation=Regularisation(max_step_grad_norm=4e-4),
        )
        (estimates,) = run._updates(run.descent())
        facts = sum(estimate.facts["step_clip_fraction"] for estimate in estimates) / len(estimates)
        found.append((torch.cat([p.grad.flatten() for p in run.parameters.values() if p.grad is not None]), facts))
    for gradient_of, fraction in found[1:]:
        assert relative(gradient_of, found[0][0]) < 1e-4
        assert fraction == found[0][1]
    assert 0 < found[0][1] < 1


def test_a_bound_that_nothing_reaches_changes_no_bit(subject):
    estimate, ours = subject.regularised(AlignProp(Last(3)), Regularisation(max_step_grad_norm=1e9))
    assert torch.equal(ours, subject.gradient(AlignProp(Last(3))))
    assert estimate.facts == {"step_clip_fraction": 0.0}


def test_an_overflow_stays_one(diffusion):
    """The scaler of fp16 must see it."""
    regulariser, latents = diffusion.regulariser(Regularisation(max_step_grad_norm=1.0)), torch.zeros(2, 3)
    latents.requires_grad_()
    reached = latents * 1
    regulariser._bound(reached, 2)
    reached.backward(torch.tensor([[torch.inf, 1.0, 1.0], [3.0, 0.0, 4.0]]))
    assert not latents.grad[0].isfinite().all()
    assert torch.allclose(latents.grad[1], torch.tensor([3.0, 0.0, 4.0]) * WEIGHT / 5)


# Every estimator

EACH = {
    "alignprop": AlignProp(Last(3)),
    "alignprop-as-released": AsReleased(low=0, high=1),
    "draft-k": DraftK(2),
    "draft-lv": DraftLV(2),
    "drtune": DRTune(2, early_stop=2),
    "flowbp-sparse": FlowBPSparse(3),
    "leapalign": LeapAlign(),
    "refl": ReFL(late_steps=2),
}


@pytest.mark.parametrize("name", EACH)
def test_every_estimator_is_regularised(subject, name, monkeypatch):
    denoiser = subject.pipeline.transformer if subject.kind == "flow_prediction" else subject.pipeline.unet
    forward, calls = denoiser.forward, []
    _, free = subject.regularised(EACH[name], Regularisation())
    monkeypatch.setattr(denoiser, "forward", lambda *args, **kwargs: (calls.append(1), forward(*args, **kwargs))[1])
    estimate, found = subject.regularised(EACH[name], replace(BOTH, max_step_grad_norm=1e-3))
    assert found.isfinite().all() and found.any() and relative(found, free) > 1e-2
    assert estimate.calls == len(calls)
    assert estimate.facts["kl"] > 0 and estimate.facts["l2"] > 0 and estimate.facts["step_clip_fraction"] > 0


def test_off_is_off(subject):
    for estimator in EACH.values():
        estimate, found = subject.regularised(estimator, Regularisation())
        assert torch.equal(found, subject.gradient(estimator))
        assert not estimate.facts


def test_a_draw_without_live_steps_has_no_penalty(diffusion):
    estimator = AsReleased(low=T - 1)
    draw = next(seed for seed in range(50) if not estimator.kept(T, generator(seed)))
    estimate, found = diffusion.regularised(estimator, replace(BOTH, max_step_grad_norm=1.0), draw)
    assert not found.any()
    assert estimate.facts == {"kl": 0.0, "l2": 0.0, "step_clip_fraction": 0.0}


def test_ddpo_stays_near_the_base_model(diffusion):
    """What the penalties add to its gradient, against its own steps' by hand, at the latents that were drawn."""
    values, batch = list(diffusion.adapter.parameters.values()), MicroBatch(0, tiny.PROMPTS, SEEDS, generator())
    sampler = Sampler(diffusion.pipeline, diffusion.call())
    seen = DDPO().collect(sampler, as_weighted_sum(each_contrast), batch)
    found = []
    for settings in (None, BOTH):
        for value in values:
            value.grad = torch.zeros_like(value)
        regulariser = settings and diffusion.regulariser(settings)
        estimate = DDPO().improve(sampler, seen, torch.ones(2), WEIGHT, first=True, regulariser=regulariser)
        found.append(torch.cat([value.grad.flatten() for value in values]))
    by_hand, loss = PenaltyByHand(diffusion), 0
    hand, latents = by_hand.hand, [by_hand.hand.start, *seen.latents]
    for i in seen.log_probabilities:
        x, variance = latents[i], (hand.sigmas[i + 1] / hand.sigmas[i]) ** 2
        variance = variance * (1 - (hand.alphas[i] / hand.alphas[i + 1]) ** 2)
        moved = by_hand.predict(x, i) - by_hand.base.predict(x, i).detach()
        slope_of = (hand.sigmas[i + 1] ** 2 - variance).sqrt() - hand.alphas[i + 1] * hand.sigmas[i] / hand.alphas[i]
        loss = loss + KL * ((slope_of * moved) ** 2 / (2 * variance)).mean((1, 2, 3)).sum()
    loss = WEIGHT * (loss + L2 * sum(by_hand.l2).sum() / len(by_hand.l2))
    assert relative(found[1] - found[0], gradient(loss, diffusion.adapter)) < 1e-4
    assert estimate.calls == 2 * len(seen.log_probabilities)
    assert estimate.facts["l2"] == pytest.approx((sum(by_hand.l2) / len(by_hand.l2)).mean().item(), rel=1e-4)


# The run


@pytest.mark.parametrize("estimator", [AlignProp(Uniform()), DDPO(min_count=2)], ids=["alignprop", "ddpo"])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, estimator):
    settings = replace(BOTH, max_step_grad_norm=0.05 if estimator.needs_gradient else None)

    def run(path):
        fresh = copy.deepcopy(estimator)
        return trainer(steps=4, regularisation=settings, estimator=fresh, callbacks=callbacks(path))

    lines = metrics_of_resumed(tmp_path, run)
    assert {"kl", "l2"} <= lines[-1].keys() and lines[-1]["kl"] > 0


def test_a_penalty_keeps_the_model_near_its_base():
    """The same steps, with and without: the reward rises less far from where it began."""
    distances = []
    for l2 in (0.0, 100.0):
        run = trainer(
            dropout=0.0,
            call=tiny.CALL,
            estimator=AlignProp(Last(2)),
            optimizer=Optimizer(learning_rate=3e-2),
            regularisation=Regularisation(l2=l2),
        )
        for _ in range(6):
            run.train_step()
        regulariser = Regulariser(Regularisation(l2=1.0), run.adapter.disabled, 1.0)
        rollout = replace(run.sampler, regulariser=regulariser).rollout(tiny.PROMPTS, [0, 1])
        distances.append(rollout.penalty.mean().item())
    assert distances[1] < 0.5 * distances[0]


def test_a_scheduler_that_says_nothing_of_its_noise_is_refused(diffusion):
    other = copy.copy(diffusion)
    other.pipeline = tiny.stable_diffusion(torch.float64)
    other.pipeline.scheduler, other.adapter = HeunDiscreteScheduler(), Adapter(other.pipeline)
    with pytest.raises(ValueError, match=r"^regularisation.kl needs the noise of each .*: HeunDiscreteScheduler draws"):
        other.regularised(DraftK(2), Regularisation(kl=1.0))
    estimate, _ = other.regularised(DraftK(2), Regularisation(l2=1.0))
    assert estimate.facts == {"l2": 0.0}


def test_rows_that_are_no_whole_pictures_are_refused(diffusion):
    regulariser = diffusion.regulariser(Regularisation(l2=1.0))
    sampler = Sampler(diffusion.pipeline, diffusion.call(), regulariser=regulariser)
    with pytest.raises(ValueError, match=r"^regularisation compares whole pictures, .* 4 rows for 3 of them"):
        regulariser.penalty(*[*compared(sampler)] * 2, 3, 1)


def compared(sampler):
    found = []
    regulariser = sampler.regulariser
    penalty = regulariser.penalty
    regulariser.penalty = lambda tuned, *rest: (found.append(tuned), penalty(tuned, *rest))[1]
    sampler.rollout(tiny.PROMPTS, SEEDS, live_steps=1)
    del regulariser.penalty
    return found


def test_settings_without_effect_are_refused_in_code():
    for settings, changes, sentence in (
        (BOTH, {"estimator": RWR()}, "regularisation.kl=3 is not for estimator RWR, which heeds no regulariser: leave"),
        (
            Regularisation(max_step_grad_norm=1.0),
            {"estimator": DDPO()},
            "regularisation.max_step_grad_norm=1 is not for estimator DDPO, which heeds kl and l2: leave it out",
        ),
        (Regularisation(l2=1.0), {"lora": Full()}, "regularisation.l2=1 compares with the base model, which full"),
    ):
        with pytest.raises(ValueError, match=f"^{sentence}"):
            trainer(regularisation=settings, **changes)
    for arguments, sentence in (
        ({"kl": -1}, "regularisation.kl=-1 needs at least 0"),
        ({"l2": -0.5}, "regularisation.l2=-0.5 needs at least 0"),
        ({"max_step_grad_norm": 0}, "regularisation.max_step_grad_norm=0 needs to be above 0, or None"),
    ):
        with pytest.raises(ValueError, match=f"^{sentence}"):
            Regularisation(**arguments)


def test_full_training_takes_the_bound():
    run = trainer(lora=Full(), dropout=0.0, regularisation=Regularisation(max_step_grad_norm=1e-5))
    assert run.train_step()["step_clip_fraction"] > 0


REFUSED = {
    "regularisation={kl: -1}": "regularisation.kl=-1 needs at least 0",
    "regularisation={max_step_grad_norm: 0}": "regularisation.max_step_grad_norm=0 needs more than 0",
    "regularisation={l3: 1}": "regularisation.l3 is no setting; did you mean regularisation.l2?",
}


@pytest.mark.parametrize("override", REFUSED)
def test_bad_settings_are_told(override):
    with pytest.raises(ConfigError) as error:
        load_config("emoji", [override])
    assert REFUSED[override] in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["estimator.name=rwr"], "regularisation.kl=0.1 is not for estimator rwr, which heeds no regulariser: leave"),
        (["adapter.kind=full"], "regularisation.kl=0.1 compares with the base model, which full training overwrites"),
        (
            ["estimator.name=ddpo", "regularisation.max_step_grad_norm=2"],
            "regularisation.max_step_grad_norm=2 is not for estimator ddpo, which heeds kl and l2: leave it out.",
        ),
    ],
)
def test_settings_without_effect_are_told_before_anything_loads(overrides, sentence):
    with pytest.raises(ConfigError) as error:
        load_config("emoji", ["regularisation.kl=0.1", *overrides])
    assert error.value.problems[0].startswith(sentence) and len(error.value.problems) == 1


def test_settings_reach_the_trainer(tmp_path):
    assert load_config("emoji").regularisation == type(load_config("emoji").regularisation)()
    settings = {"kl": 0.5, "l2": 2.0, "max_step_grad_norm": 3.0}
    config = load_config("emoji", [f"regularisation={settings}".replace("'", "")])
    built = build(config, tmp_path)
    assert built.regularisation == Regularisation(**settings)
