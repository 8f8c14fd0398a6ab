"""DDPO and RWR: probabilities, ratios and gradients against closed forms, loops written by hand and a toy."""

import json

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

import test_trainer
import tiny
import toy
from alignprop.config import ConfigError, load_config
from alignprop.estimators import DDPO, RWR, MicroBatch
from alignprop.estimators.advantages import PromptStatistics
from alignprop.estimators.rwr import collect
from alignprop.memory import LiveBytes
from alignprop.rewards import as_weighted_sum
from alignprop.rollout import Sampler
from test_cli import run as command
from test_rollout import perturbed, relative
from test_trainer import redness, trainer

CALL = {"num_inference_steps": 5, "guidance_scale": 2.0}


def batch(seeds=(0, 1), prompts=tiny.PROMPTS, index=0):
    return MicroBatch(index, list(prompts), list(seeds), torch.Generator().manual_seed(0))


def accumulated(parameters):
    return torch.cat([parameter.grad.flatten() for parameter in parameters if parameter.grad is not None])


# The policy gradient


def ddim_chain_by_hand(pipeline, seeds, latents, *, steps, guidance):
    """Log-densities of given latents under DDIM with eta 1 (arXiv 2010.02502, eq. 12), written out; (steps, B)."""
    encoded, negative = pipeline.encode_prompt(tiny.PROMPTS, "cpu", 1, True)
    context = torch.cat([negative, encoded])
    noises = [torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(s), dtype=context.dtype) for s in seeds]
    x_t, config, stride, told = torch.cat(noises), pipeline.scheduler.config, 1000 // steps, []
    betas = torch.linspace(config.beta_start**0.5, config.beta_end**0.5, 1000, dtype=torch.float32) ** 2
    alphas = torch.cumprod(1 - betas, 0).double()
    times = reversed([k * stride + config.steps_offset for k in range(steps)])
    for t, x_next in zip(times, latents, strict=True):
        eps_negative, eps = pipeline.unet(torch.cat([x_t, x_t]), t, context).sample.chunk(2)
        eps = eps_negative + guidance * (eps - eps_negative)
        a_t, a_next = alphas[t], alphas[t - stride] if t >= stride else alphas[0]
        std = ((1 - a_next) / (1 - a_t) * (1 - a_t / a_next)) ** 0.5
        x_0 = (x_t - (1 - a_t) ** 0.5 * eps) / a_t**0.5
        mean = a_next**0.5 * x_0 + (1 - a_next - std**2) ** 0.5 * eps
        told.append(torch.distributions.Normal(mean, std).log_prob(x_next).mean((1, 2, 3)))
        x_t = x_next
    return torch.stack(told)


def test_log_probabilities_and_the_clipped_gradient_are_those_of_a_loop_written_by_hand(sd64):
    """Before an update the gradient is the score function's; after it, PPO's, with ratios on both sides of the clip."""
    adapter, sampler = perturbed(sd64), Sampler(sd64, CALL)
    values, ddpo = list(adapter.parameters.values()), DDPO(clip_range=1e-5)
    seen = ddpo.collect(sampler, as_weighted_sum(redness), batch())
    by_hand = ddim_chain_by_hand(sd64, [0, 1], seen.latents, steps=5, guidance=2.0)
    old = torch.stack(list(seen.log_probabilities.values()))
    assert torch.allclose(old, by_hand.detach(), atol=1e-5)  # the scheduler keeps its alphas in float32
    advantages = torch.tensor([1.5, -0.5])
    for first in (True, False):
        ratio = (ddim_chain_by_hand(sd64, [0, 1], seen.latents, steps=5, guidance=2.0) - by_hand.detach()).exp()
        loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - 1e-5, 1 + 1e-5)).mean(0).sum() / 2
        expected = torch.cat([part.flatten() for part in torch.autograd.grad(loss, values)])
        estimate = ddpo.improve(sampler, seen, advantages, 1 / 2, first=first)
        assert relative(accumulated(values), expected) < 1e-4
        clipped = ((ratio - 1).abs() > 1e-5).double().mean().item()
        assert estimate.facts["clip_fraction"] == pytest.approx(clipped)
        assert 0 < clipped < 1 or first
        with torch.no_grad():
            for value in values:
                value.add_(3e-4 * value.grad.sign())
                value.grad = None


def test_the_ratio_is_exactly_one_until_something_is_learned(sd):
    run = trainer(estimator=DDPO(min_count=2, inner_epochs=2), dropout=0.0, batch_size=4, accumulation=2)
    errors = []
    for estimates in run._updates(run.descent()):
        errors.append([estimate.facts["ratio_error"] for estimate in estimates])
        run._update()
    assert errors[0] == [0.0, 0.0]
    assert min(errors[1]) > 0


def test_a_policy_that_changed_before_it_learned_is_noticed():
    run, calls = trainer(estimator=DDPO(min_count=2), dropout=0.0), []
    forward = run.pipeline.unet.forward

    def drifting(sample, *args, **kwargs):
        calls.append(None)
        return forward(sample * (1 + 1e-3 * len(calls)), *args, **kwargs)

    run.pipeline.unet.forward = drifting
    with pytest.raises(
        test_trainer.TrainingStopped, match=r"ratio off 1 by .*: the denoiser keeps state or draws noise"
    ):
        run.train_step()


@pytest.mark.parametrize(
    ("dtype", "least", "most"), [(torch.float32, 1e-9, 1e-5), (torch.bfloat16, 1e-5, 5e-2), (torch.float16, 1e-5, 5e-2)]
)
def test_passes_with_and_without_gradient_may_round_apart_as_the_denoisers_dtype_does(dtype, least, most):
    """As with attention that has one kernel for inference and another for training."""
    unguided = {**tiny.CALL, "guidance_scale": 1.0}  # guidance multiplies rounding by itself
    run = trainer(dtype=dtype, estimator=DDPO(), dropout=0.0, call=unguided)
    run.pipeline.vae.to(torch.float32)
    plain, fused, forward = AttnProcessor(), AttnProcessor2_0(), run.pipeline.unet.forward

    def other_kernels(*args, **kwargs):
        run.pipeline.unet.set_attn_processor(plain if torch.is_grad_enabled() else fused)
        return forward(*args, **kwargs)

    run.pipeline.unet.forward = other_kernels
    assert least < run.train_step()["ratio_error"] < most


def test_a_policy_in_half_precision_that_changed_is_noticed_as_well():
    run = trainer(dtype=torch.bfloat16, estimator=DDPO(), dropout=0.0)
    forward = run.pipeline.unet.forward
    run.pipeline.unet.forward = lambda x_t, *args, **kwargs: forward(
        x_t * (2 if torch.is_grad_enabled() else 1), *args, **kwargs
    )
    with pytest.raises(test_trainer.TrainingStopped, match=r"ratio off 1 by .*: the denoiser keeps state"):
        run.train_step()


def test_dropout_is_the_same_while_pictures_are_drawn_and_learned_from():
    run = trainer(estimator=DDPO(min_count=2), dropout=0.3, optimizer=test_trainer.Optimizer(learning_rate=0.1))
    run.train_step()
    assert run.train_step()["ratio_error"] == 0


def test_the_estimate_is_the_derivative_of_the_expected_reward():
    """On a linear toy, whose expectation has a closed form; in standard errors over independent batches."""
    sampler, ddpo, estimates = toy.sampler(), DDPO(max_advantage=1e9, clip_range=1.0), []
    means = []
    parameters = list(sampler.pipeline.unet.parameters())
    exact = torch.autograd.grad(toy.expected_reward(sampler.pipeline, 1.0), parameters)
    exact = torch.cat([part.flatten() for part in exact])
    count = 40_000
    for seed in range(20):
        seen = ddpo.collect(sampler, as_weighted_sum(toy.reward), batch([seed] * count, ["x"] * count))
        means.append(seen.scores.mean())
        advantages = seen.scores - seen.scores.mean()
        ddpo.improve(sampler, seen, advantages, 1 / count, first=True)
        # Log-probabilities are means over the elements and the loss one over the steps, and a loss is minimised.
        scale = -toy.NUM_ELEMENTS * len(seen.latents)
        estimates.append(accumulated(parameters) * scale)
        for parameter in parameters:
            parameter.grad = None
    means = torch.stack(means)
    assert (means.mean() - toy.expected_reward(sampler.pipeline, 1.0)).abs() < 4 * means.std() / len(means) ** 0.5
    found = torch.stack(estimates)
    error = found.std(0) / len(found) ** 0.5
    assert ((found.mean(0) - exact).abs() < 4 * error).all()
    assert relative(found.mean(0), exact) < 0.1


def test_memory_does_not_grow_with_the_number_of_denoising_steps(sd):
    def peak(num_steps):
        perturbed(sd)
        sampler, ddpo = Sampler(sd, {**CALL, "num_inference_steps": num_steps}), DDPO()
        seen = ddpo.collect(sampler, as_weighted_sum(redness), batch())
        with LiveBytes() as live:
            ddpo.improve(sampler, seen, torch.tensor([1.0, -1.0]), 1.0, first=False)
        sd.unload_lora_weights()
        return live.peak

    assert peak(12) < 1.1 * peak(4)


# Reward-weighted regression


@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "flow"])
def test_rwr_is_the_weighted_loss_of_diffusion_training(prediction, guided):
    pipeline = tiny.stable_diffusion_3(torch.float64) if prediction == "flow" else tiny.stable_diffusion(torch.float64)
    if prediction == "v_prediction":
        pipeline.scheduler = tiny.scheduler(prediction_type="v_prediction")
    adapter, sampler, seen = perturbed(pipeline), Sampler(pipeline, CALL), []
    drawn = collect(sampler, as_weighted_sum(redness), batch())
    denoiser = pipeline.transformer if prediction == "flow" else pipeline.unet
    forward = denoiser.forward

    def spied(*args, **kwargs):
        output = forward(*args, **kwargs)
        latents = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        time = kwargs["timestep"] if "timestep" in kwargs else args[1]
        seen.append((latents.detach(), time.flatten()[0], output[0]))
        return output

    denoiser.forward = spied
    weights = torch.tensor([1.25, 0.75])
    RWR(guided=guided).imitate(sampler, drawn, weights, epoch=0)
    found = accumulated(adapter.parameters.values())
    assert [len(x_t) for x_t, _, _ in seen] == [4 if guided else 2] * 5  # guidance doubles the batch
    loss = 0
    for x_t, time, output in seen:
        x_t = x_t[:2]
        if prediction == "flow":
            sigma = time.double() / 1000
            target = (x_t - (1 - sigma) * drawn.x_0) / sigma - drawn.x_0
        else:
            alpha = pipeline.scheduler.alphas_cumprod[int(time)].double()
            noise = (x_t - alpha**0.5 * drawn.x_0) / (1 - alpha) ** 0.5
            v = alpha**0.5 * noise - (1 - alpha) ** 0.5 * drawn.x_0
            target = v if prediction == "v_prediction" else noise
        output = forward_again(forward, x_t, time, pipeline, prediction)
        if guided:
            plain = forward_again(forward, x_t, time, pipeline, prediction, ["", ""])
            output = plain + CALL["guidance_scale"] * (output - plain)
        loss = loss + (weights * ((output - target) ** 2).mean((1, 2, 3))).sum() / 5
    for value in adapter.parameters.values():
        value.grad = None
    loss.backward()
    assert relative(found, accumulated(adapter.parameters.values())) < 1e-5


def forward_again(forward, x_t, time, pipeline, prediction, prompts=tiny.PROMPTS):
    """The denoiser's output for the prompts, outside any pipeline."""
    if prediction == "flow":
        context, _, pooled, _ = pipeline.encode_prompt(prompts, None, None, do_classifier_free_guidance=False)
        times = time.expand(len(x_t))
        return forward(hidden_states=x_t, timestep=times, encoder_hidden_states=context, pooled_projections=pooled)[0]
    context, _ = pipeline.encode_prompt(prompts, "cpu", 1, False)
    return forward(x_t, time, encoder_hidden_states=context)[0]


@pytest.mark.parametrize("keep", [None, 0.5])
def test_weights_of_rwr(keep):
    rwr = RWR(inverse_temperature=0.7, keep=keep, min_count=2)
    drawn = [collected([1.0, 3.0], ["a", "b"]), collected([2.0, 6.0], ["a", "b"])]
    weights = torch.cat(rwr._weights(drawn))
    # Each prompt has two rewards, one a deviation above and one below their mean.
    better, worse = (1.0, -1.0)
    if keep is None:
        expected = torch.tensor([worse, worse, better, better]).mul(0.7).softmax(0) * 4
    else:
        expected = torch.tensor([0.0, 0.0, 2.0, 2.0])
    assert torch.allclose(weights, expected, atol=1e-5)


def collected(scores, prompts):
    from alignprop.estimators.rwr import Drawn

    return Drawn(batch([0, 1], prompts), {}, torch.tensor(scores), torch.zeros(2, 1), 1, 1)


# What both have


def test_statistics_of_a_prompt_are_its_latest_rewards():
    statistics, everything = PromptStatistics(size=3, min_count=3), torch.tensor([1.0, 5.0])
    statistics.observe(["a"] * 4 + ["b"], [100.0, 1.0, 2.0, 3.0, 7.0])
    found = statistics.advantages(["a", "b"], torch.tensor([4.0, 7.0]), everything)
    assert found.tolist() == pytest.approx([(4 - 2) / (2 / 3) ** 0.5, (7 - 3) / 2], rel=1e-5)
    other = PromptStatistics(size=3, min_count=3)
    other.load_state(json.loads(json.dumps(statistics.state())))
    assert other.seen == statistics.seen and other.seen["a"].maxlen == 3


def test_advantages_are_bounded():
    ddpo = DDPO(max_advantage=1.2, min_count=2)
    seen = [ddpo.collect(Sampler(tiny.stable_diffusion(), CALL), as_weighted_sum(redness), batch(range(4), "aaaa"))]
    (bounded,) = ddpo._advantages(seen)
    (free,) = DDPO(max_advantage=9.0, min_count=2)._advantages(seen)
    assert free.abs().max() > 1.2 and torch.equal(bounded, free.clamp(-1.2, 1.2))


def test_minibatches_share_the_pictures_and_weigh_as_much():
    """Two updates on half of the pictures each: their gradients are on average that of all pictures."""
    whole, halves = ([], [])
    for gradients, minibatches in ((whole, 1), (halves, 2)):
        run = trainer(estimator=DDPO(min_count=2, minibatches=minibatches), dropout=0.0, batch_size=2, accumulation=2)
        for _ in run._updates(run.descent()):
            gradients.append(accumulated(run.parameters.values()))
            run.adamw.zero_grad()
    assert len(halves) == 2
    assert relative((halves[0] + halves[1]) / 2, whole[0]) < 1e-5


@pytest.mark.parametrize("make", [lambda: DDPO(min_count=2, inner_epochs=2, minibatches=2), lambda: RWR(min_count=2)])
def test_counts_are_of_what_was_done(make):
    run = trainer(estimator=make(), dropout=0.0, batch_size=2, accumulation=2, call={**tiny.CALL})
    calls, forward = [], run.pipeline.unet.forward
    run.pipeline.unet.forward = lambda *args, **kwargs: (calls.append(None), forward(*args, **kwargs))[1]
    metrics = run.train_step()
    assert metrics["images_scored"] == run.images_drawn == 4
    assert metrics["denoiser_calls"] == 2 * len(calls)


def test_a_reward_without_gradient_trains(tmp_path):
    settings = ["sampling.num_inference_steps=2", "training.steps=1", "training.batch_size=2", "evaluation=null"]
    arguments = [part for setting in settings for part in ("--set", setting)]
    for name in ("ddpo", "rwr"):
        folder = tmp_path / name
        chosen = ["--set", f"estimator.name={name}", "--set", "rewards={jpeg-size: 1}", "--output", str(folder)]
        result = command("train", "emoji", *arguments, *chosen)
        assert result.exit_code == 0, result.output
        assert (folder / "adapter" / "pytorch_lora_weights.safetensors").is_file()


REFUSED = {
    "adapter.text_encoders=true": "adapter.text_encoders=true needs an estimator that backpropagates the whole picture",
    "estimator.checkpointing=auto": "estimator.checkpointing=auto is for estimators that backpropagate the reward",
    "estimator.arguments={clip_rang: 1}": "estimator.arguments.clip_rang is none of ddpo's; did you mean 'clip_range'?",
    "estimator.arguments={clip_range: many}": "estimator.arguments.clip_range='many' does not fit: input should be a",
    "estimator.arguments={clip_range: 0}": "estimator.arguments.clip_range=0 needs to be above 0.",
    "estimator.arguments={inner_epochs: 1.5}": "estimator.arguments.inner_epochs=1.5 does not fit",
    "estimator.arguments={min_count: 1}": "estimator.arguments.min_count=1 needs at least 2",
    "estimator.arguments={buffer_size: 4}": "estimator.arguments.buffer_size=4 needs at least min_count=16.",
    "estimator.arguments={minibatches: 3}": "estimator.arguments.minibatches=3 needs to divide training.accumulation=1",
    "estimator.arguments={checkpointing: block}": "estimator.arguments.checkpointing has a setting of its own",
}


@pytest.mark.parametrize("setting", REFUSED)
def test_bad_settings_are_told_before_anything_loads(setting):
    with pytest.raises(ConfigError) as error:
        load_config("emoji", ["estimator.name=ddpo", setting])
    assert REFUSED[setting] in str(error.value)


def test_a_sampler_without_noise_is_refused():
    pipeline = tiny.stable_diffusion_3()
    with pytest.raises(
        ValueError, match=r"FlowMatchEulerDiscreteScheduler draws none: set .*stochastic_sampling: true"
    ):
        DDPO().collect(Sampler(pipeline, CALL), as_weighted_sum(redness), batch())
    pipeline.scheduler.register_to_config(stochastic_sampling=True)
    seen = DDPO().collect(Sampler(pipeline, CALL), as_weighted_sum(redness), batch())
    assert (len(seen.latents), list(seen.log_probabilities)) == (5, [0, 1, 2, 3])


def test_steps_without_noise_between_others_are_gone_through_and_not_learned_from(sd64):
    """The gradient of a chain with two quiet steps is that of the noisy ones alone."""
    adapter, sampler, advantages = perturbed(sd64), Sampler(sd64, CALL), torch.tensor([1.0, -1.0])
    values, step = list(adapter.parameters.values()), type(sd64.scheduler).step

    class Quiet(type(sd64.scheduler)):
        def step(self, model_output, timestep, sample, eta=0.0, **arguments):
            quiet = int(timestep) in (601, 201)
            return step(self, model_output, timestep, sample, eta=0.0 if quiet else eta, **arguments)

    sd64.scheduler = Quiet.from_config(sd64.scheduler.config)
    ddpo = DDPO()
    seen = ddpo.collect(sampler, as_weighted_sum(redness), batch())
    assert list(seen.log_probabilities) == [0, 2, 4]
    ddpo.improve(sampler, seen, advantages, 1 / 2, first=True)
    by_hand = ddim_chain_by_hand(sd64, [0, 1], seen.latents, steps=5, guidance=2.0)[[0, 2, 4]]
    loss = -(advantages * (by_hand - by_hand.detach()).exp()).mean(0).sum() / 2
    expected = torch.autograd.grad(loss, values)
    assert relative(accumulated(values), torch.cat([part.flatten() for part in expected])) < 1e-4


def test_minibatches_must_divide_the_micro_batches():
    run = trainer(estimator=DDPO(minibatches=3), dropout=0.0, accumulation=2)
    with pytest.raises(ValueError, match=r"minibatches=3 needs to divide training.accumulation=2"):
        run.train_step()


def test_every_estimator_is_described_with_its_settings():
    from alignprop.config.settings import ESTIMATORS

    listed = command("estimators").output
    for name in ESTIMATORS:
        assert name in listed
        told = " ".join(command("estimators", name).output.split())
        assert "arXiv" in told or name == "alignprop-as-released"
    assert "estimator.arguments.clip_range = 0.0001" in " ".join(command("estimators", "ddpo").output.split())
    wrong = command("estimators", "dpo")
    assert wrong.exit_code == 1 and "did you mean 'ddpo'?" in wrong.stderr
