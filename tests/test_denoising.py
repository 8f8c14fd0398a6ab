"""What a denoising step means, against what the schedulers themselves compute and against closed forms."""

import math

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
    IPNDMScheduler,
    KDPM2DiscreteScheduler,
    LCMScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)

import tiny
from alignprop.denoising import (
    clean_estimate,
    gaussian,
    leap,
    log_probability,
    noise_level,
    noised,
    prediction_type,
    target,
)
from alignprop.steps import Transition, scheduler_copy

T = 5
SHAPE = (2, 3, 4, 4)
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 2.0}
V, SAMPLE = {"prediction_type": "v_prediction"}, {"prediction_type": "sample"}
UNCLIPPED = {"clip_sample": False}


def unclipped(cls, config):
    return tiny.scheduler(cls, **config) if "flow" not in cls.__module__ else cls(**config)


def transitions(scheduler, num_steps=T, dtype=torch.float64, **arguments):
    """Every step of a run on made-up denoiser outputs, each with all that the scheduler returned."""
    scheduler.set_timesteps(num_steps)
    noise = torch.Generator().manual_seed(0)
    x = (
        torch.randn(SHAPE, generator=noise, dtype=torch.float64) * float(getattr(scheduler, "init_noise_sigma", 1))
    ).to(dtype)
    times = scheduler.timesteps
    for step, time in enumerate(times):
        if hasattr(scheduler, "scale_model_input"):
            scheduler.scale_model_input(x, time)
        output = torch.randn(SHAPE, generator=noise, dtype=torch.float64).to(dtype)
        before = scheduler_copy(scheduler)
        returned = scheduler.step(output, time, x, **arguments)
        called = {"model_output": output, "timestep": time, "sample": x, **arguments}
        yield Transition(step, len(times), before, called, returned[0]), returned
        x = returned[0]


def squares(scheduler, time):
    """The variance of the picture, alpha_t^2."""
    return scheduler.alphas_cumprod[int(time)].double().item()


PICTURES = {
    "ddim": (DDIMScheduler, {}),
    "ddim-v": (DDIMScheduler, V),
    "ddim-sample": (DDIMScheduler, SAMPLE),
    "ddpm": (DDPMScheduler, UNCLIPPED),
    "ddpm-v": (DDPMScheduler, UNCLIPPED | V),
    "euler": (EulerDiscreteScheduler, {}),
    "euler-v": (EulerDiscreteScheduler, V),
    "euler-karras": (EulerDiscreteScheduler, {"use_karras_sigmas": True}),
    "euler-ancestral": (EulerAncestralDiscreteScheduler, {}),
    "euler-ancestral-v": (EulerAncestralDiscreteScheduler, V),
    "lms-v": (LMSDiscreteScheduler, V),
}


@pytest.mark.parametrize("name", PICTURES)
def test_the_clean_estimate_is_the_schedulers_own(name):
    for seen, returned in transitions(unclipped(*PICTURES[name])):
        torch.testing.assert_close(clean_estimate(seen), returned.pred_original_sample, rtol=1e-5, atol=1e-5)


CONVERTED = {
    "dpm++": (DPMSolverMultistepScheduler, {}),
    "dpm++-v": (DPMSolverMultistepScheduler, V),
    "dpm++-sample": (DPMSolverMultistepScheduler, SAMPLE),
    "dpm++-karras": (DPMSolverMultistepScheduler, {"use_karras_sigmas": True}),
    "dpm++-flow": (DPMSolverMultistepScheduler, FLOW),
    "unipc": (UniPCMultistepScheduler, {}),
    "unipc-flow": (UniPCMultistepScheduler, FLOW),
    "deis-v": (DEISMultistepScheduler, V),
}


@pytest.mark.parametrize("name", CONVERTED)
def test_the_clean_estimate_is_what_multistep_schedulers_convert_outputs_into(name):
    for seen, _ in transitions(unclipped(*CONVERTED[name])):
        asked = scheduler_copy(seen.scheduler)
        if asked.step_index is None:
            asked._init_step_index(seen.arguments["timestep"])
        x_0 = asked.convert_model_output(seen.arguments["model_output"], sample=seen.arguments["sample"])
        if name.startswith("deis"):  # converts into noise
            alpha, sigma = noise_level(seen, seen.step)
            x_0 = (seen.arguments["sample"] - sigma * x_0) / alpha
        torch.testing.assert_close(clean_estimate(seen), x_0, rtol=1e-5, atol=1e-5)


def test_the_clean_estimate_of_lcm_is_what_it_denoises_to_up_to_its_boundary_condition():
    for seen, returned in transitions(unclipped(LCMScheduler, UNCLIPPED)):
        torch.testing.assert_close(clean_estimate(seen), returned.denoised, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_matching_in_closed_form(shift):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    for seen, _ in transitions(scheduler):
        sigma = scheduler.sigmas[seen.step].double()
        alpha, noise = noise_level(seen, seen.step)
        assert (alpha.item(), noise.item()) == pytest.approx((1 - sigma.item(), sigma.item()), abs=1e-12)
        expected = seen.arguments["sample"] - sigma * seen.arguments["model_output"]
        torch.testing.assert_close(clean_estimate(seen), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "cls", [DDIMScheduler, DDPMScheduler, LCMScheduler, PNDMScheduler, DPMSolverMultistepScheduler]
)
def test_noise_levels_that_keep_the_variance(cls):
    scheduler = unclipped(cls, {})
    for seen, _ in transitions(scheduler):
        alpha, sigma = noise_level(seen, seen.step)
        square = squares(scheduler, seen.timestep)
        assert (alpha.item(), sigma.item()) == pytest.approx((square**0.5, (1 - square) ** 0.5), rel=1e-5)
        assert alpha.ndim == sigma.ndim == 0


@pytest.mark.parametrize("cls", [EulerDiscreteScheduler, EulerAncestralDiscreteScheduler, LMSDiscreteScheduler])
def test_noise_levels_that_scale_the_noise_alone(cls):
    scheduler = unclipped(cls, {"timestep_spacing": "leading"})
    for seen, _ in transitions(scheduler):
        alpha, sigma = noise_level(seen, seen.step)
        square = squares(scheduler, seen.timestep)
        assert (alpha.item(), sigma.item()) == (1.0, pytest.approx(((1 - square) / square) ** 0.5, rel=1e-5))


def test_noise_levels_do_not_depend_on_where_a_run_is():
    """Schedulers take the noise level of the step that they are at, whatever the timestep."""
    for name in ("euler", "dpm++", "unipc-flow"):
        every = [seen for seen, _ in transitions(unclipped(*(PICTURES | CONVERTED)[name]))]
        expected = [noise_level(every[0], step) for step in range(len(every))]
        for seen in every:
            seen.scheduler.set_begin_index(0)
            assert [noise_level(seen, step) for step in range(len(every))] == expected


def test_the_level_of_a_timestep_that_comes_twice_is_that_of_its_step():
    scheduler = unclipped(DPMSolverMultistepScheduler, {"use_karras_sigmas": True})
    scheduler.set_timesteps(50)
    times = scheduler.timesteps.tolist()
    twice = next(step for step in range(49) if times[step] == times[step + 1])
    x = torch.zeros(SHAPE, dtype=torch.float64)
    for step in (twice, twice + 1):
        arguments = {"sample": x, "model_output": x, "timestep": scheduler.timesteps[step]}
        alpha, sigma = noise_level(Transition(step, 50, scheduler, arguments, x), step)
        assert (sigma / alpha).item() == pytest.approx(scheduler.sigmas[step].item(), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_does_not_round_the_end_of_the_chain_away(dtype):
    scheduler = unclipped(DDIMScheduler, {})
    scheduler.set_timesteps(20)
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).to(dtype)
    arguments = {"sample": x, "model_output": x, "timestep": scheduler.timesteps[-1], "eta": 1.0}
    seen, wide = (
        Transition(19, 20, scheduler, {**arguments, "sample": each, "model_output": each}, each)
        for each in (x, x.double())
    )
    torch.testing.assert_close(torch.stack(noise_level(seen, 19)), torch.stack(noise_level(wide, 19)).float())
    torch.testing.assert_close(target(seen, x), target(wide, x.double()).float(), rtol=1e-4, atol=1e-3)
    assert clean_estimate(seen).dtype == leap(seen, 19).dtype == noised(seen, x, x, 3).dtype == dtype
    mean, deviation = gaussian(seen)
    expected_mean, expected = gaussian(wide)
    assert deviation.item() == pytest.approx(expected.item(), rel=1e-3)
    told = log_probability(x, mean, deviation)
    torch.testing.assert_close(told, log_probability(x.double(), expected_mean, expected).float(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", [*PICTURES, *CONVERTED, "lcm", "pndm", "flow-match"])
def test_the_target_is_the_output_whose_clean_estimate_is_the_picture(name):
    more = {
        "lcm": (LCMScheduler, V),
        "pndm": (PNDMScheduler, {}),
        "flow-match": (FlowMatchEulerDiscreteScheduler, {"shift": 3.0}),
    }
    scheduler = unclipped(*(PICTURES | CONVERTED | more)[name])
    x_0, noise = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    for seen, _ in transitions(scheduler):
        x_t = noised(seen, x_0, noise, seen.step)
        arguments = seen.arguments | {"sample": x_t}
        said = target(Transition(seen.step, seen.num_steps, seen.scheduler, arguments, x_t), x_0)
        known = {"epsilon": noise, "flow_prediction": noise - x_0, "sample": x_0}.get(prediction_type(seen.scheduler))
        if known is not None:
            torch.testing.assert_close(said, known, rtol=1e-8, atol=1e-8)
        after = Transition(seen.step, seen.num_steps, seen.scheduler, arguments | {"model_output": said}, x_t)
        torch.testing.assert_close(clean_estimate(after), x_0, rtol=1e-6, atol=1e-6)


def test_the_target_of_v_prediction_is_the_velocity():
    for seen, _ in transitions(unclipped(DDIMScheduler, V)):
        scheduler, time = seen.scheduler, seen.arguments["timestep"]
        x_0, noise = torch.randn(2, *SHAPE, dtype=torch.float64)
        arguments = {**seen.arguments, "sample": noised(seen, x_0, noise, seen.step)}
        velocity = scheduler.get_velocity(x_0, noise, time.reshape(1))
        said = target(Transition(seen.step, seen.num_steps, scheduler, arguments, None), x_0)
        torch.testing.assert_close(said, velocity, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["ddim", "ddim-v", "euler", "euler-v", "flow-match", "dpm++", "unipc-flow"])
def test_a_leap_to_the_next_step_is_the_step_of_a_first_order_scheduler(name):
    more = {"flow-match": (FlowMatchEulerDiscreteScheduler, {"shift": 3.0})}
    cls, config = (PICTURES | CONVERTED | more)[name]
    config = config | ({"solver_order": 1} if name in CONVERTED else {})
    config = config | ({"disable_corrector": list(range(T))} if name.startswith("unipc") else {})
    for seen, returned in transitions(unclipped(cls, config)):
        if not seen.is_last:
            reached = leap(seen, seen.step + 1)
            torch.testing.assert_close(reached, returned[0].double(), rtol=2e-5, atol=2e-5)


def test_two_leaps_along_one_straight_line_are_one():
    """The line of a flow is straight: the same velocity leads from far to near over any step in between."""
    scheduler = FlowMatchEulerDiscreteScheduler()
    first, *_ = (seen for seen, _ in transitions(scheduler))
    times = scheduler.timesteps
    between = leap(first, 2)
    arguments = {"sample": between, "model_output": first.arguments["model_output"], "timestep": times[2]}
    second = Transition(2, T, scheduler, arguments, between)
    torch.testing.assert_close(leap(second, 4), leap(first, 4), rtol=1e-10, atol=1e-10)


def ddim(seen, eta):
    scheduler, time = seen.scheduler, int(seen.arguments["timestep"])
    here, later = squares(scheduler, time), squares(scheduler, max(time - 1000 // T, 0))
    deviation = eta * math.sqrt((1 - later) / (1 - here) * (1 - here / later))
    noise = seen.arguments["model_output"]
    x_0 = (seen.arguments["sample"] - (1 - here) ** 0.5 * noise) / here**0.5
    return later**0.5 * x_0 + (1 - later - deviation**2) ** 0.5 * noise, deviation


def ddpm(seen):
    """arXiv 2006.11239, eq. 7, with the posterior's variance."""
    scheduler, time = seen.scheduler, int(seen.arguments["timestep"])
    here, later = squares(scheduler, time), 1.0 if seen.is_last else squares(scheduler, time - 1000 // T)
    x_t, beta = seen.arguments["sample"], 1 - here / later
    x_0 = (x_t - (1 - here) ** 0.5 * seen.arguments["model_output"]) / here**0.5
    mean = later**0.5 * beta / (1 - here) * x_0 + (here / later) ** 0.5 * (1 - later) / (1 - here) * x_t
    return mean, 0.0 if seen.is_last else math.sqrt((1 - later) / (1 - here) * beta)


def euler_ancestral(seen):
    here, later = seen.scheduler.sigmas.double()[seen.step : seen.step + 2].tolist()
    up = math.sqrt(later**2 * (here**2 - later**2) / here**2)
    down = math.sqrt(later**2 - up**2)
    return seen.arguments["sample"] + (down - here) * seen.arguments["model_output"], up


def stochastic_flow(seen):
    here, later = seen.scheduler.sigmas.double()[seen.step : seen.step + 2].tolist()
    x_0 = seen.arguments["sample"] - here * seen.arguments["model_output"]
    return (1 - later) * x_0, later


def lcm(seen):
    later = 1.0 if seen.is_last else squares(seen.scheduler, seen.scheduler.timesteps[seen.step + 1])
    here = squares(seen.scheduler, seen.arguments["timestep"])
    x_0 = (seen.arguments["sample"] - (1 - here) ** 0.5 * seen.arguments["model_output"]) / here**0.5
    return later**0.5 * x_0, (1 - later) ** 0.5


GAUSSIANS = {
    "ddim-0.3": (DDIMScheduler, {}, {"eta": 0.3}, lambda seen: ddim(seen, 0.3)),
    "ddim-1": (DDIMScheduler, {}, {"eta": 1.0}, lambda seen: ddim(seen, 1.0)),
    "ddpm": (DDPMScheduler, UNCLIPPED | {"steps_offset": 0}, {}, ddpm),
    "euler-ancestral": (EulerAncestralDiscreteScheduler, {}, {}, euler_ancestral),
    "flow": (FlowMatchEulerDiscreteScheduler, {"stochastic_sampling": True}, {}, stochastic_flow),
    "lcm": (LCMScheduler, UNCLIPPED, {}, lcm),
}


@pytest.mark.parametrize("name", GAUSSIANS)
def test_mean_and_deviation_in_closed_form(name):
    cls, config, arguments, closed = GAUSSIANS[name]
    for seen, _ in transitions(unclipped(cls, config), **arguments):
        mean, deviation = gaussian(seen)
        expected = closed(seen)
        torch.testing.assert_close(
            mean.double(), expected[0], rtol=1e-3 if name == "lcm" else 2e-5, atol=1e-3 if name == "lcm" else 1e-5
        )
        assert deviation.item() == pytest.approx(expected[1], rel=1e-5, abs=1e-6)
        assert deviation.ndim == 0


@pytest.mark.parametrize("name", [*GAUSSIANS, "sde-dpm++"])
def test_what_was_drawn_is_the_mean_and_the_deviation_times_the_noise(name):
    """Also where a multistep history enters the mean."""
    sde = (DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}, {})
    cls, config, arguments = sde if name == "sde-dpm++" else GAUSSIANS[name][:3]
    torch_generator = torch.Generator().manual_seed(3)
    replayed = torch.Generator()
    state = torch_generator.get_state()
    for seen, returned in transitions(unclipped(cls, config), generator=torch_generator, **arguments):
        replayed.set_state(state)
        mean, deviation = gaussian(seen)
        dtype = torch.float32 if name in ("flow", "sde-dpm++") else torch.float64
        noise = torch.randn(SHAPE, generator=replayed, dtype=dtype).double()
        torch.testing.assert_close(returned[0].double(), mean + deviation * noise, rtol=1e-5, atol=1e-5)
        state = torch_generator.get_state()


@pytest.mark.parametrize("name", ["ddim", "euler", "dpm++", "unipc", "unipc-flow", "flow-match"])
def test_deterministic_schedulers_deviate_by_nothing(name):
    more = {"flow-match": (FlowMatchEulerDiscreteScheduler, {})}
    for seen, returned in transitions(unclipped(*(PICTURES | CONVERTED | more)[name])):
        mean, deviation = gaussian(seen)
        assert torch.equal(mean, returned[0]) and deviation.item() == 0


@pytest.mark.parametrize("name", ["ddim", "euler-ancestral", "sde-dpm++", "unipc"])
def test_asking_for_the_mean_changes_neither_scheduler_nor_random_state(name):
    more = {"sde-dpm++": (DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"})}
    arguments = {"eta": 1.0} if name == "ddim" else {}
    torch_generator = torch.Generator().manual_seed(3)

    def state(scheduler):
        return {key: list(value) if isinstance(value, list) else value for key, value in vars(scheduler).items()}

    def same(one, other):
        if isinstance(one, list):
            return len(one) == len(other) and all(map(same, one, other))
        return one is other or (not isinstance(one, torch.Tensor) and one == other)

    if name != "unipc":
        arguments["generator"] = torch_generator
    for seen, _ in transitions(unclipped(*(PICTURES | CONVERTED | more)[name]), **arguments):
        before, drawn, own = state(seen.scheduler), torch.get_rng_state(), torch_generator.get_state()
        gaussian(seen)
        after = state(seen.scheduler)
        assert before.keys() == after.keys() and all(same(before[key], after[key]) for key in before)
        assert torch.equal(torch.get_rng_state(), drawn) and torch.equal(torch_generator.get_state(), own)


def test_the_mean_carries_gradient_and_the_deviation_none():
    seen = list(transitions(unclipped(DDIMScheduler, {}), eta=1.0))[1][0]
    output = seen.arguments["model_output"].clone().requires_grad_()
    arguments = seen.arguments | {"model_output": output}
    mean, deviation = gaussian(Transition(1, T, seen.scheduler, arguments, seen.latents))
    (slope,) = torch.autograd.grad(mean.sum(), output)
    moved = seen.arguments | {"model_output": output.detach() + 1}
    difference = gaussian(Transition(1, T, seen.scheduler, moved, seen.latents))[0] - mean.detach()
    torch.testing.assert_close(slope, difference, rtol=1e-8, atol=1e-8)  # linear in the output
    assert not deviation.requires_grad


def test_log_probability_is_the_mean_of_the_log_density():
    latents, mean = torch.randn(2, *SHAPE, dtype=torch.float64)
    mean.requires_grad_()
    for deviation in (0.1, 2.0):
        expected = torch.distributions.Normal(mean, deviation).log_prob(latents).mean((1, 2, 3))
        measured = log_probability(latents, mean, torch.tensor(deviation, dtype=torch.float64))
        torch.testing.assert_close(measured, expected, rtol=1e-10, atol=1e-10)
        slopes = [torch.autograd.grad(each.sum(), mean)[0] for each in (measured, expected)]
        torch.testing.assert_close(*slopes, rtol=1e-10, atol=1e-10)
    # What was drawn is a fact: with the mean it depends on the weights, by itself it must not.
    drawn = (mean + 0.1).requires_grad_()
    measured = log_probability(drawn, mean.detach(), torch.tensor(0.1, dtype=torch.float64))
    assert not measured.requires_grad


def test_a_run_may_take_the_last_part_of_the_schedule_but_not_jump():
    scheduler = unclipped(DDIMScheduler, {})
    scheduler.set_timesteps(T)
    x = torch.zeros(SHAPE)

    def at(step, num_steps, place):
        arguments = {"sample": x, "model_output": x, "timestep": scheduler.timesteps[place]}
        return Transition(step, num_steps, scheduler, arguments, x)

    late = at(1, 3, 3)  # of a run that began later
    assert noise_level(late, 2)[0] ** 2 == pytest.approx(squares(scheduler, scheduler.timesteps[4]))
    for odd, step in ((at(1, T, 2), 1), (at(0, T + 1, 0), 0), (at(4, T, 4), T)):
        with pytest.raises(ValueError, match=r"^DDIMScheduler is not stepped through its schedule one by one\.$"):
            noise_level(odd, step)


REFUSED = [
    HeunDiscreteScheduler,
    KDPM2DiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    EDMEulerScheduler,
    EDMDPMSolverMultistepScheduler,
    IPNDMScheduler,
]


@pytest.mark.parametrize("cls", REFUSED)
def test_schedulers_that_do_not_say_are_refused_by_name(cls):
    scheduler = cls()
    scheduler.set_timesteps(T)
    x = torch.zeros(SHAPE)
    assert len(scheduler.timesteps) >= T
    arguments = {"sample": x, "model_output": x, "timestep": scheduler.timesteps[0]}
    seen = Transition(0, T, scheduler, arguments, x)
    sentence = f"^{cls.__name__} does not say how a clean picture follows from one denoising step.*: use DDIMScheduler"
    for ask in (clean_estimate, lambda seen: target(seen, x), lambda seen: leap(seen, 1)):
        with pytest.raises(ValueError, match=sentence):
            ask(seen)
