"""Plans: which denoising steps are live or held, what is seen of each, and where another may lead."""

from itertools import pairwise

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

import tiny
from alignprop.rollout import Sampler, rollout
from alignprop.spec import spec_of
from alignprop.steps import EnoughError, Plan, Transition, held_step, scheduler_copy, with_latents
from test_gradient_estimators import IN_FLOAT32, SEEDS, Subject, T, truncated
from test_rollout import attributes, contrast, gradient, perturbed, pipeline_with, relative

NAMES = ("ddim", "dpm++", "flow-match")
"""One step at a time, several, and Stable Diffusion 3."""


class Watched:
    """A tiny pipeline whose steps and denoiser inputs are written down."""

    def __init__(self, name):
        self.pipeline = pipeline_with(name)
        self.adapter = perturbed(self.pipeline)
        self.sampler = Sampler(self.pipeline, tiny.CALL | {"num_inference_steps": T})
        self.seen, self.received = [], []
        (denoiser,) = spec_of(self.pipeline).denoisers_of(self.pipeline)
        forward = denoiser.forward

        def receive(*args, **kwargs):
            latents = args[0] if args else kwargs["hidden_states"]
            self.received.append(latents.detach()[: len(SEEDS)])  # guidance doubles them
            return forward(*args, **kwargs)

        denoiser.forward = receive

    def rollout(self, plan, lead=lambda seen: None, **changes):
        self.seen, self.received = [], []

        def on_step(seen):
            self.seen.append(seen)
            return lead(seen)

        return self.sampler.rollout(tiny.PROMPTS, SEEDS, plan=lambda num_steps: plan, on_step=on_step, **changes)

    def gradient(self, plan, **changes):
        return gradient(contrast(self.rollout(plan, **changes).pixels), self.adapter)


@pytest.fixture(params=NAMES)
def watched(request):
    return Watched(request.param)


@pytest.fixture(scope="module", params=["epsilon", "v_prediction", "flow_prediction"])
def subject(request):
    return Subject(request.param)


def history(scheduler):
    """What a scheduler remembers of earlier steps, by identity."""
    lists = {name: list(map(id, value)) for name, value in vars(scheduler).items() if isinstance(value, list)}
    return lists, getattr(scheduler, "lower_order_nums", 0)


@pytest.mark.parametrize("live", [[], [2], [0, 3]])
def test_the_live_steps_are_those_of_the_plan_and_the_picture_is_the_same(subject, live):
    sampler = Sampler(subject.pipeline, subject.call())
    ours = sampler.rollout(tiny.PROMPTS, SEEDS, plan=lambda num_steps: Plan(live))
    assert torch.equal(ours.pixels.detach().float(), sampler.sample(tiny.PROMPTS, SEEDS))
    assert (ours.live_steps, ours.live_calls, ours.calls) == (len(live), len(live), T)
    if not live:
        assert not ours.pixels.requires_grad
        return
    hand = subject.by_hand()
    expected = gradient(contrast(hand.pixels(truncated(hand, live))), subject.adapter)
    assert relative(gradient(contrast(ours.pixels), subject.adapter), expected) < IN_FLOAT32


@pytest.mark.parametrize("held", [[1], [2, 3], [4]])
def test_a_held_step_changes_nothing(watched, held):
    ours = watched.rollout(Plan(live=[0], held=held))
    assert ours.calls == len(watched.received) == T - len(held)
    multistep = isinstance(watched.pipeline.scheduler, DPMSolverMultistepScheduler)
    for seen, following in pairwise(watched.seen):
        unchanged = history(seen.scheduler) == history(following.scheduler)
        assert unchanged == (seen.step in held or not multistep)
        assert torch.equal(seen.latents, seen.arguments["sample"]) == (seen.step in held)
        if hasattr(following.scheduler, "_step_index"):  # which moves on in the schedule
            assert following.scheduler._step_index == following.step
    assert torch.equal(ours.latents, at_the_decoder(watched, watched.seen[-1].latents.detach()))


def at_the_decoder(watched, latents):
    config = watched.pipeline.vae.config
    return latents / config.scaling_factor + (config.shift_factor or 0)


def test_held_steps_are_left_out_of_the_chain(subject):
    """Against the chain written by hand without them."""
    hand, held = subject.by_hand(), (1, 3)
    x = hand.start
    for i in set(range(T)) - set(held):
        x = hand.step(x, i, hand.predict(x, i))
    sampler = Sampler(subject.pipeline, subject.call())
    ours = sampler.rollout(tiny.PROMPTS, SEEDS, plan=lambda num_steps: Plan(live=range(T), held=held))
    pixels = hand.pixels(x)
    torch.testing.assert_close(ours.pixels, pixels.clamp(0, 1), rtol=1e-5, atol=1e-5)
    assert relative(*(gradient(contrast(each), subject.adapter) for each in (ours.pixels, pixels))) < IN_FLOAT32
    assert (ours.calls, ours.live_calls) == (3, 3)


def test_a_plan_may_begin_with_held_steps_given_a_stand_in(watched):
    first = watched.rollout(Plan(live=[]))
    start, latest = watched.seen[0].arguments["sample"], watched.seen[-1].arguments["sample"]
    plan = Plan(live=[T - 1], held=range(T - 1), stand_in=first.stand_in)
    again = watched.rollout(plan, lambda seen: latest if seen.step == T - 2 else None)
    assert again.calls == 1
    assert all(torch.equal(seen.latents, start) for seen in watched.seen[: T - 1])
    if not isinstance(watched.pipeline.scheduler, DPMSolverMultistepScheduler):  # which had a history
        assert torch.equal(again.pixels, first.pixels)
    assert gradient(contrast(again.pixels), watched.adapter).abs().max() > 0
    with pytest.raises(AssertionError, match="needs a stand_in"):
        watched.rollout(Plan(live=[T - 1], held=[0]))


def test_what_is_written_into_a_held_steps_output_stays_there(sd64):
    """Some pipelines write into what the denoiser returned; the stand-in is used again."""
    seen, sampler = [], Sampler(sd64, tiny.CALL | {"guidance_scale": 1.0})  # hands it to the scheduler as it is

    def spoil(transition):
        output = transition.arguments["model_output"]
        seen.append(output.clone())
        if transition.step in (1, 2):
            output.zero_()

    ours = sampler.rollout(tiny.PROMPTS, SEEDS, plan=lambda n: Plan(live=[], held=[1, 2, 3]), on_step=spoil)
    assert all(torch.equal(output, seen[0]) for output in seen)
    assert torch.equal(ours.stand_in[0], seen[0])


@pytest.mark.parametrize("at", [0, 2, T - 1])
def test_other_latents_reach_the_next_call_or_the_decoder_with_their_gradient(watched, at):
    latents = 0.5 * torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    latents.requires_grad_()
    ours = watched.rollout(Plan(live=range(T)), lambda seen: latents if seen.step == at else None)
    if at == T - 1:
        torch.testing.assert_close(ours.latents, at_the_decoder(watched, latents.detach()), rtol=0, atol=1e-12)
    else:
        assert torch.equal(watched.received[at + 1], latents.detach())
        assert watched.seen[at + 1].arguments["sample"] is latents
    slope, *rest = torch.autograd.grad(
        contrast(ours.pixels), [latents, *watched.adapter.parameters.values()], allow_unused=True
    )
    assert slope.abs().max() > 0
    if at == T - 1:
        assert all(part is None for part in rest)  # nothing of the chain is left in the picture


def test_each_transition_is_a_call_of_the_schedulers_step(watched):
    ours = watched.rollout(Plan(live=range(T)))
    assert [seen.step for seen in watched.seen] == list(range(T)) and {seen.num_steps for seen in watched.seen} == {T}
    assert [seen.is_last for seen in watched.seen] == [False] * (T - 1) + [True]
    for seen, following in pairwise([*watched.seen, None]):
        arguments = seen.arguments
        assert {"model_output", "timestep", "sample"} <= arguments.keys() and "self" not in arguments
        assert arguments["timestep"] == seen.scheduler.timesteps[seen.step]
        assert torch.equal(arguments["sample"].detach(), watched.received[seen.step])
        repeated = seen.scheduler.step(**arguments)[0]  # a copy in the state before the call
        assert torch.equal(repeated, seen.latents) and seen.latents.requires_grad
        if following is not None:
            assert following.arguments["sample"] is seen.latents
    assert torch.equal(ours.latents, at_the_decoder(watched, watched.seen[-1].latents.detach()))


def test_arguments_of_the_pipelines_call_reach_the_transition(sd64):
    seen, generator = [], torch.Generator().manual_seed(0)
    rollout(sd64, "a cat", num_inference_steps=2, eta=0.4, generator=generator, on_step=seen.append)
    assert all(each.arguments["eta"] == 0.4 and each.arguments["generator"] is generator for each in seen)


def test_a_scheduler_copy_shares_no_history():
    watched = Watched("dpm++")
    watched.rollout(Plan(live=range(T)))
    scheduler = watched.seen[2].scheduler
    assert "step" not in vars(scheduler) and any(output is not None for output in scheduler.model_outputs)
    before, place = history(scheduler), scheduler.step_index
    twin = scheduler_copy(scheduler)
    assert history(twin) == before and twin.model_outputs is not scheduler.model_outputs
    twin.step(**watched.seen[2].arguments)
    assert history(scheduler) == before and scheduler.step_index == place
    assert history(twin) != before and twin.step_index == place + 1
    user = watched.pipeline.scheduler
    assert user.step_index is None and user.model_outputs == [None] * user.config.solver_order


def test_a_held_step_looks_like_a_real_one():
    scheduler = tiny.scheduler(DDIMScheduler)
    scheduler.set_timesteps(4)
    x, output = torch.randn(2, 1, 4, 4, 4)
    named = {"model_output": output, "timestep": scheduler.timesteps[0], "sample": x}
    real = scheduler.step(**named)
    held = held_step(scheduler, (), named)
    assert type(held) is type(real) and held.prev_sample is x and held.pred_original_sample is x
    held = held_step(scheduler, (output, scheduler.timesteps[0], x), {"return_dict": False})
    assert isinstance(held, tuple) and held[0] is x
    replaced = with_latents(real, output)
    assert replaced.prev_sample is output and replaced.pred_original_sample is output
    assert torch.equal(real[0], scheduler.step(**named)[0])  # which stays as it is


@pytest.mark.parametrize("factor", [0.0, 0.3, 1.0])
def test_the_input_gradient_scales_the_path_through_the_denoiser_and_no_value(subject, factor):
    """Against the chain by hand, where each live call is given ``f x + (1 - f) sg(x)``."""
    sampler = Sampler(subject.pipeline, subject.call())
    ours = sampler.rollout(tiny.PROMPTS, SEEDS, plan=lambda n: Plan(live=[0, 1, 3], input_gradient=factor))
    plain = sampler.rollout(tiny.PROMPTS, SEEDS, plan=lambda n: Plan(live=[]))
    assert torch.equal(ours.pixels, plain.pixels)  # to the last bit
    hand = subject.by_hand()
    x = hand.start
    for i in range(T):
        output = hand.predict(factor * x + (1 - factor) * x.detach(), i)
        x = hand.step(x, i, output if i in (0, 1, 3) else output.detach())
    expected = gradient(contrast(hand.pixels(x)), subject.adapter)
    assert relative(gradient(contrast(ours.pixels), subject.adapter), expected) < IN_FLOAT32


@pytest.mark.parametrize("mode", ["none", "nested"])
def test_two_live_steps_depend_on_the_input_gradient_in_a_straight_line(watched, mode):
    def at(factor):
        return watched.gradient(Plan(live=[2, 4], input_gradient=factor), checkpointing=mode)

    cut, whole = at(0.0), at(1.0)
    assert relative(cut, whole) > 1e-4
    assert relative(at(0.3), cut + 0.3 * (whole - cut)) < 1e-6


@pytest.mark.parametrize("name", ["ddim", "dpm++"])
@pytest.mark.parametrize("enough", [True, False])
def test_a_walk_decodes_nothing_and_restores_everything(name, enough, monkeypatch):
    pipeline = pipeline_with(name)
    sampler = Sampler(pipeline, tiny.CALL)
    sampler.sample(tiny.PROMPTS, SEEDS)
    monkeypatch.setattr(pipeline.vae, "decode", lambda *args, **kwargs: pytest.fail("it decodes"))
    before, seen = attributes(pipeline), []

    def look(transition):
        seen.append(transition.latents.requires_grad)
        if enough and transition.step == 1:
            raise EnoughError

    trace = sampler.walk(tiny.PROMPTS, SEEDS, lambda num_steps: Plan(live=[]), look)
    assert len(seen) == trace.calls == (2 if enough else 4)
    assert trace.num_steps == 4 and not any(seen) and not trace.decoded and trace.output is not None
    own = {"_guidance_scale", "_guidance_rescale", "_clip_skip", "_cross_attention_kwargs", "_interrupt"}
    own.add("_num_timesteps")
    for old, new in zip(before, attributes(pipeline), strict=True):
        assert {k: v for k, v in old.items() if k not in own} == {k: v for k, v in new.items() if k not in own}
    assert torch.is_grad_enabled()


def test_other_errors_pass_through_a_walk(sd64):
    def look(transition):
        raise KeyError("of the caller")

    before = attributes(sd64)[1:]  # but for what the call leaves on the pipeline
    with pytest.raises(KeyError, match="of the caller"):
        Sampler(sd64, tiny.CALL).walk(tiny.PROMPTS, SEEDS, lambda num_steps: Plan(live=[]), look)
    assert attributes(sd64)[1:] == before and torch.is_grad_enabled()


def test_a_walk_goes_where_on_step_leads_and_carries_gradient_in_live_steps(watched):
    latents, seen = torch.zeros(2, 4, 8, 8, dtype=torch.float64), []

    def lead(transition):
        seen.append(transition)
        return latents

    watched.received = []
    watched.sampler.walk(tiny.PROMPTS, SEEDS, lambda num_steps: Plan(live=[1]), lead)
    assert [each.arguments["model_output"].requires_grad for each in seen] == [False, True, False, False, False]
    assert all(torch.equal(received, latents) for received in watched.received[1:]) and len(watched.received) == T


def test_enough_ends_a_rollout_before_it_decodes(sd64):
    """Only a walk takes it: a rollout owes a picture."""

    def look(transition: Transition):
        raise EnoughError

    with pytest.raises(EnoughError):
        rollout(sd64, "a cat", num_inference_steps=2, on_step=look)
