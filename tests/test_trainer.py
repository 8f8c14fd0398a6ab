"""The training loop: it learns, it resumes exactly, it stops on what is not finite."""

import itertools
import math
import os
import signal

import pytest
import torch
from safetensors.torch import load_file

import tiny
from alignprop import checkpointing
from alignprop.adapters import Lora
from alignprop.checkpointing import CheckpointError, Checkpoints, list_checkpoints, load_checkpoint, save_checkpoint
from alignprop.estimators import AlignProp
from alignprop.evaluation import Evaluation
from alignprop.guard import NO_GUARD
from alignprop.measures import diversity, evaluate
from alignprop.probe import probe, require
from alignprop.rollout import Sampler
from alignprop.runfolder import RunFolder
from alignprop.tracking import MetricsFile
from alignprop.trainer import Callback, Optimizer, Trainer, TrainingStopped
from alignprop.truncation import Last, Uniform

TRAIN = ("a cat", "a dog", "a fox", "an ox", "a hen")


def redness(images, prompts):
    return images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))


def trainer(*, dtype=torch.float32, reward=redness, dropout=0.1, callbacks=(), **changes):
    settings = {
        "call": {**tiny.CALL, "eta": 0.5},
        "steps": 6,
        "batch_size": 2,
        "accumulation": 2,
        "lora": Lora(dropout=dropout),
        "optimizer": Optimizer(learning_rate=1e-2, warmup_steps=2, ema_decay=0.9),
        "estimator": AlignProp(Uniform()),
    }
    return Trainer(tiny.stable_diffusion(dtype), reward, TRAIN, callbacks=callbacks, **(settings | changes))


def callbacks(path, **evaluation):
    folder = RunFolder(path)
    sets = {"unseen": ("a bee",), "train": TRAIN[:2]}
    judges = {"brightness": lambda images, prompts: images.mean((1, 2, 3))}
    return (
        Evaluation(folder, sets, judges, every=2, images_per_prompt=2, **evaluation),
        MetricsFile(folder),
        Checkpoints(folder, every=2, keep=9),
    )


def weights(trained):
    return {name: value.detach().clone() for name, value in trained.parameters.items()}


def without_timings(lines):
    return [
        {k: v for k, v in line.items() if k not in ("seconds", "train_seconds", "peak_memory_mb")} for line in lines
    ]


def metrics_of_resumed(tmp_path, run):
    """The metrics of a whole run, after a check that one that is resumed after two steps has the same, and the weights.

    `run` makes a trainer, with its callbacks, for a folder.
    """
    whole, first = run(tmp_path / "whole"), run(tmp_path / "parts")
    whole.train()
    first.steps = 2
    first.train()
    second = run(tmp_path / "parts")
    load_checkpoint(second, list_checkpoints(RunFolder(tmp_path / "parts").checkpoints)[-1])
    second.train()
    for name, value in weights(whole).items():
        assert torch.equal(value, second.parameters[name]), name
    lines = [without_timings(RunFolder(tmp_path / name).metrics.read()) for name in ("whole", "parts")]
    assert lines[0] == lines[1]
    return lines[0]


def test_the_reward_rises_on_prompts_that_were_not_trained(tmp_path):
    fast = Optimizer(learning_rate=3e-2)
    run = trainer(steps=12, dropout=0.0, call=tiny.CALL, optimizer=fast, callbacks=callbacks(tmp_path))
    run.train()
    lines = RunFolder(tmp_path).evaluations.read()
    before, after = lines[0]["sets"]["unseen"]["reward"], lines[-1]["sets"]["unseen"]["reward"]
    assert after["mean"] > before["mean"] + 5 * before["std"]
    assert [line["step"] for line in lines] == [0, 2, 4, 6, 8, 10, 12]
    assert [line["images_scored"] for line in RunFolder(tmp_path).metrics.read()] == [4 * n for n in range(1, 13)]


def test_one_step_is_adamw_on_the_clipped_mean_gradient():
    """Against the same step written by hand: accumulation averages over all images, clipping comes before AdamW."""
    run = trainer(
        dropout=0.0, estimator=AlignProp(Last(2)), optimizer=Optimizer(learning_rate=1e-2, max_grad_norm=1e-3)
    )
    by_hand = trainer(dropout=0.0, estimator=AlignProp(Last(2)))
    values = list(by_hand.parameters.values())
    adamw = torch.optim.AdamW(values, lr=1e-2, weight_decay=1e-4)
    for micro_batch in (0, 1):
        prompts, seeds = by_hand.batch(micro_batch)
        pixels = by_hand.sampler.rollout(prompts, seeds, 2).pixels
        (-redness(pixels, prompts).mean() / 2).backward()
    norm = torch.stack([value.grad.norm() for value in values if value.grad is not None]).norm()
    for value in values:
        value.grad = (torch.zeros_like(value) if value.grad is None else value.grad) * min(1, 1e-3 / (norm + 1e-6))
    adamw.step()
    metrics = run.train_step()
    assert metrics["grad_norm"] == pytest.approx(norm.item(), rel=1e-5)
    for name, value in run.parameters.items():
        assert torch.allclose(value, by_hand.parameters[name], atol=1e-6), name


def test_warm_up_and_average_follow_their_formulas():
    run = trainer(optimizer=Optimizer(learning_rate=1e-2, warmup_steps=4, ema_decay=0.9), steps=3)
    average = weights(run)
    for step in range(3):
        assert run.train_step()["lr"] == pytest.approx(1e-2 * (step + 1) / 4)
        decay = min(0.9, (1 + step) / (10 + step)) if step else 0.0  # diffusers' EMAModel starts gently
        average = {n: decay * average[n] + (1 - decay) * v for n, v in weights(run).items()}
    for name, value in run.evaluated_weights().items():
        assert torch.allclose(value, average[name], atol=1e-6), name


def test_prompts_and_seeds_come_once_each_per_epoch_and_never_repeat():
    run, prompts, seeds = trainer(batch_size=1, accumulation=1), [], []
    for run.images_drawn in range(10):
        batch = run.batch(0)
        prompts += batch[0]
        seeds += batch[1]
    assert sorted(prompts[:5]) == sorted(prompts[5:]) == sorted(TRAIN)
    assert prompts[:5] != prompts[5:]
    assert len(set(seeds)) == 10


def test_a_prompt_comes_as_often_in_succession_as_is_asked_for():
    singles, repeated = trainer(batch_size=6), trainer(batch_size=4, accumulation=3, images_per_prompt=2)
    prompts, seeds = zip(*(repeated.batch(place) for place in range(3)), strict=True)
    assert [*itertools.chain(*prompts)] == [prompt for prompt in singles.batch(0)[0] for _ in range(2)]
    assert len({*itertools.chain(*seeds)}) == 12


@pytest.mark.parametrize("stop", [2, 4])
def test_a_resumed_run_is_the_run_that_never_stopped(tmp_path, stop):
    whole, parts = RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "parts")
    straight = trainer(callbacks=callbacks(whole.path))
    straight.train()
    first = trainer(callbacks=callbacks(parts.path))
    first.steps = stop + 1  # as if killed one step after the checkpoint
    first.train()
    second = trainer(callbacks=callbacks(parts.path))
    load_checkpoint(second, parts.checkpoints / f"step-{stop:06d}")
    second.train()
    for name, value in straight.parameters.items():
        assert torch.equal(value, second.parameters[name]), name
        assert torch.equal(straight.evaluated_weights()[name], second.evaluated_weights()[name])
    assert without_timings(whole.metrics.read()) == without_timings(parts.metrics.read())
    final = [line["step"] for line in whole.evaluations.read()]
    assert without_timings(whole.evaluations.read()) == without_timings(
        line for line in parts.evaluations.read() if line["step"] in final
    )
    for picture in sorted((whole.path / "samples").rglob("*.png")):
        assert picture.read_bytes() == (parts.path / picture.relative_to(whole.path)).read_bytes()
    kept = "adapter/pytorch_lora_weights.safetensors"
    for name, value in load_file(whole.path / kept).items():
        assert torch.equal(value, load_file(parts.path / kept)[name])


def test_a_resumed_run_needs_every_part_of_the_state():
    """The comparison above can fail: a resume without the optimizer's moments goes elsewhere."""
    run = trainer()
    run.train_step()
    state = run.state()
    again = trainer()
    again.load_state({**state, "optimizer": {}})
    run.train_step(), again.train_step()
    assert any(not torch.equal(value, again.parameters[name]) for name, value in run.parameters.items())


def test_checkpoints_appear_whole_and_old_ones_go(tmp_path, monkeypatch):
    run = trainer(steps=6, callbacks=[Checkpoints(RunFolder(tmp_path), every=1, keep=2)])
    run.train()
    assert [path.name for path in list_checkpoints(tmp_path / "checkpoints")] == ["step-000005", "step-000006"]

    def full(*args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr(checkpointing, "save_file", full)
    run.step = 7
    with pytest.raises(OSError, match="no space"):
        save_checkpoint(run, tmp_path / "checkpoints")
    assert [path.name for path in list_checkpoints(tmp_path / "checkpoints")] == ["step-000005", "step-000006"]


def damage_nothing(path):
    (path / "state.json").unlink()


def damage_json(path):
    (path / "state.json").write_text('{"format": "alignprop-ch')


def damage_format(path):
    (path / "state.json").write_text('{"format": "another"}')


def damage_tensors(path):
    file = path / "state.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


@pytest.mark.parametrize("damage", [damage_nothing, damage_json, damage_format, damage_tensors])
def test_a_damaged_checkpoint_is_refused_by_name(tmp_path, damage):
    run = trainer()
    path = save_checkpoint(run, tmp_path)
    damage(path)
    before = weights(run)
    with pytest.raises(CheckpointError, match="step-000000"):
        load_checkpoint(run, path)
    assert all(torch.equal(value, before[name]) for name, value in run.parameters.items())


def test_a_checkpoint_of_another_adapter_is_refused(tmp_path):
    path = save_checkpoint(trainer(), tmp_path)
    with pytest.raises(CheckpointError, match="of another adapter"):
        load_checkpoint(trainer(lora=Lora(rank=2)), path)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_reward_that_is_not_finite_stops_the_run_and_says_where(tmp_path, bad):
    calls = []

    def fragile(images, prompts):
        calls.append(None)
        scores = redness(images, prompts)
        return scores + torch.tensor([0.0, bad]) if len(calls) > 5 else scores

    run = trainer(reward=fragile, callbacks=[Checkpoints(RunFolder(tmp_path), every=1)])
    prompts = []
    with pytest.raises(TrainingStopped, match="step 3: reward 'fragile' is not finite") as stopped:
        run.train()
    prompts = run.batch(1)[0]
    assert repr(prompts[1]) in str(stopped.value)
    load_checkpoint(trainer(), tmp_path / "checkpoints" / "step-000002")
    assert all(value.isfinite().all() for value in run.parameters.values())


def test_a_gradient_that_is_not_finite_stops_the_run(tmp_path):
    def steep(images, prompts):
        return redness(images, prompts) + 0 * (images.detach() - images).sum((1, 2, 3)).abs().sqrt()

    run = trainer(reward=steep)
    before = weights(run)
    with pytest.raises(TrainingStopped, match=r"step 1: the gradient of steep is not finite; prompts: \['a"):
        run.train()
    assert all(torch.equal(value, before[name]) for name, value in run.parameters.items())


def test_ctrl_c_ends_the_run_between_two_steps(tmp_path):
    class Impatient(Callback):
        def step(self, trainer, metrics):
            if trainer.step == 3:
                os.kill(os.getpid(), signal.SIGINT)

    run = trainer(callbacks=[Impatient(), Checkpoints(RunFolder(tmp_path), every=100)])
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        run.train()
    assert run.step == 3
    assert [path.name for path in list_checkpoints(tmp_path / "checkpoints")] == ["step-000003"]
    assert signal.getsignal(signal.SIGINT) is before


def test_the_best_adapter_on_unseen_prompts_is_kept(tmp_path):
    """With a rate that is far too high the last adapter is not the best one."""
    run = trainer(
        callbacks=callbacks(tmp_path, guard=NO_GUARD),
        call=tiny.CALL,
        dropout=0.0,
        optimizer=Optimizer(learning_rate=0.1),
        steps=8,
    )
    run.train()
    lines = RunFolder(tmp_path).evaluations.read()
    scores = [line["sets"]["unseen"]["reward"]["mean"] for line in lines]
    kept = max(i for i, line in enumerate(lines) if line["kept"])
    assert scores[kept] == max(scores)
    assert [line["kept"] for line in lines] == [s > max(scores[:i], default=-9) for i, s in enumerate(scores)]
    plain = tiny.stable_diffusion()
    if kept:
        plain.load_lora_weights(tmp_path / "adapter")
    pictures = evaluate(Sampler(plain, tiny.CALL), ("a bee",), {"r": redness}, images_per_prompt=2, seed=1234)
    assert pictures.scores["r"].mean().item() == pytest.approx(scores[kept], abs=1e-6)


def test_evaluation_statistics_are_what_they_say():
    result = evaluate(
        Sampler(tiny.stable_diffusion(), tiny.CALL), TRAIN, {"r": redness}, images_per_prompt=3, batch_size=4
    )
    scores = result.scores["r"].double()
    again = torch.stack([redness(images, TRAIN) for images in result.images]).double()
    assert torch.allclose(scores, again)
    summary = result.summary({"r": 2.0})
    assert summary["reward"]["mean"] == pytest.approx(2 * scores.mean().item())
    assert summary["rewards"]["r"]["std"] == pytest.approx(scores.std(correction=0).item())
    assert summary["rewards"]["r"]["sem"] == pytest.approx(scores.mean(1).std().item() / 5**0.5)
    assert (summary["num_prompts"], summary["num_images"]) == (5, 15)
    a, b, c = result.images[0].double().flatten(1)
    distances = [((x - y) ** 2).mean().sqrt().item() for x, y in ((a, b), (a, c), (b, c))]
    assert diversity(result.images[:1]) == pytest.approx(sum(distances) / 3)
    assert diversity(torch.ones(2, 3, 3, 4, 4)) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_follows_float32(dtype):
    """The LoRA stays in float32, and its gradient points where the float32 one does."""

    def first_gradient(dtype):
        run = trainer(dtype=dtype, dropout=0.0, call=tiny.CALL)
        run.pipeline.vae.to(torch.float32)
        with torch.no_grad():
            for name, value in run.parameters.items():
                value.add_(0.05 * torch.randn(value.shape, generator=torch.Generator().manual_seed(len(name))))
        next(run._updates(run.descent()))
        assert all(value.dtype == torch.float32 for value in run.parameters.values())
        return torch.cat([value.grad.flatten() for value in run.parameters.values()]) / run._loss_scale()

    half, single = first_gradient(dtype), first_gradient(torch.float32)
    assert torch.cosine_similarity(half, single, 0) > 0.99
    assert half.norm() == pytest.approx(single.norm().item(), rel=0.1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_passes_the_probe_trains_evaluates_and_resumes(tmp_path, dtype):
    def make():
        run = trainer(dtype=dtype, dropout=0.0, call=tiny.CALL, steps=3, callbacks=callbacks(tmp_path))
        run.pipeline.vae.to(torch.float32)
        return run

    run = make()
    assert run.scaler.is_enabled() == (dtype == torch.float16)
    require(probe(run.sampler, run.adapter, run.objective, TRAIN[:2]))
    before = weights(run)
    run.train()
    assert all(value.isfinite().all() for value in run.parameters.values())
    assert any(not torch.equal(value, before[name]) for name, value in run.parameters.items())
    again = make()
    load_checkpoint(again, tmp_path / "checkpoints" / "step-000002")
    again.train()
    assert all(torch.equal(value, again.parameters[name]) for name, value in run.parameters.items())


def test_an_overflow_in_fp16_skips_the_step_and_leaves_the_average_alone():
    run = trainer(dtype=torch.float16, reward=lambda images, prompts: redness(images, prompts) * 1e30)
    run.pipeline.vae.to(torch.float32)
    before, average = weights(run), [value.clone() for value in run.ema.shadow_params]
    scale = run._loss_scale()
    assert run.train_step()["grad_norm"] is None
    assert run._loss_scale() == scale / 2
    assert all(torch.equal(value, before[name]) for name, value in run.parameters.items())
    assert all(torch.equal(*pair) for pair in zip(run.ema.shadow_params, average, strict=True))


def test_a_step_that_failed_leaves_nothing_for_the_next(tmp_path):
    """As in a notebook: out of memory in the second micro-batch, then another try."""
    calls = []

    def fails_once(images, prompts):
        calls.append(None)
        if len(calls) == 2:
            raise MemoryError
        return redness(images, prompts)

    run, clean = trainer(reward=fails_once), trainer()
    with pytest.raises(MemoryError):
        run.train_step()
    assert not any(layer.lora_dropout["alignprop"].training for layer in run.adapter._layers())
    assert run.train_step()["grad_norm"] == clean.train_step()["grad_norm"]


def test_an_average_may_be_begun_when_a_run_is_resumed(tmp_path):
    without = trainer(optimizer=Optimizer(ema_decay=None))
    without.train_step()
    path = save_checkpoint(without, tmp_path)
    run = trainer(optimizer=Optimizer(ema_decay=0.5))
    load_checkpoint(run, path)
    for name, value in run.evaluated_weights().items():
        assert torch.equal(value, without.parameters[name])


def test_the_last_checkpoint_holds_what_the_last_evaluation_found_best(tmp_path):
    """Saved in the last step, before the evaluation at the end of the run has looked at it."""
    fast = Optimizer(learning_rate=3e-2)
    folder = RunFolder(tmp_path)
    evaluation = Evaluation(folder, {"train": TRAIN[:2]}, every=2, images_per_prompt=2, guard=NO_GUARD)
    run = trainer(steps=9, optimizer=fast, callbacks=[evaluation, Checkpoints(folder, every=3)])
    run.train()
    assert folder.evaluations.read()[-1]["kept"] and folder.evaluations.read()[-1]["step"] == 9
    again = trainer(steps=9)
    load_checkpoint(again, list_checkpoints(folder.checkpoints)[-1])
    assert run.best.keys() == again.best.keys()
    assert all(torch.equal(value, again.best[name]) for name, value in run.best.items())


def test_a_resumed_run_keeps_the_best_adapter_of_its_own_past(tmp_path):
    """Not the one that a part of the run, which was thrown away, had found."""
    folder = RunFolder(tmp_path)
    settings = {"call": tiny.CALL, "dropout": 0.0, "optimizer": Optimizer(learning_rate=3e-2)}
    first = trainer(callbacks=callbacks(tmp_path), **settings)
    first.train()
    best_of_two = max(line["step"] for line in folder.evaluations.read()[:2] if line["kept"])
    assert folder.evaluations.read()[-1]["kept"] and best_of_two == 2
    worse = trainer(callbacks=callbacks(tmp_path), **(settings | {"optimizer": Optimizer(learning_rate=3.0)}))
    load_checkpoint(worse, folder.checkpoints / "step-000002")
    worse.train()
    kept = max((line for line in folder.evaluations.read() if line["kept"]), key=lambda line: line["step"])
    plain = tiny.stable_diffusion()
    plain.load_lora_weights(folder.adapter)
    pictures = evaluate(Sampler(plain, tiny.CALL), ("a bee",), {"r": redness}, images_per_prompt=2, seed=1234)
    assert pictures.scores["r"].mean().item() == pytest.approx(kept["sets"]["unseen"]["reward"]["mean"], abs=1e-5)


def test_a_judge_that_cannot_be_used_is_named():
    sampler = Sampler(tiny.stable_diffusion(), tiny.CALL)
    with pytest.raises(ValueError, match="reward 'judge' returned shape"):
        evaluate(sampler, TRAIN[:2], {"judge": lambda images, prompts: images.mean()})


def test_a_budget_of_images_ends_the_run_and_spaces_the_evaluations(tmp_path):
    folder = RunFolder(tmp_path)
    evaluation = Evaluation(folder, {"train": TRAIN[:1]}, every_images=6, images_per_prompt=1)
    run = trainer(steps=100, max_images=18, batch_size=2, accumulation=2, callbacks=[evaluation])
    run.train()
    assert (run.step, run.images_scored) == (5, 20)  # steps of 4 images: the one that passes 18 is the last
    assert [line["images_scored"] for line in folder.evaluations.read()] == [0, 8, 12, 20]
    assert [line["denoiser_calls"] for line in folder.evaluations.read()] == [0, 32, 48, 80]


def test_a_budget_of_seconds_counts_the_steps_alone(tmp_path, monkeypatch):
    clock = iter(range(0, 10_000, 3))  # every look at the clock is 3 s after the last
    monkeypatch.setattr("alignprop.trainer.time.perf_counter", lambda: next(clock))
    folder = RunFolder(tmp_path)
    evaluation = Evaluation(folder, {"train": TRAIN[:1]}, every_seconds=6, images_per_prompt=1)
    run = trainer(steps=100, max_seconds=10, batch_size=1, accumulation=1, callbacks=[evaluation])
    run.train()
    assert (run.step, run.train_seconds) == (4, 12)
    assert [line["train_seconds"] for line in folder.evaluations.read()] == [0, 6, 12]
    again = trainer(steps=100, max_seconds=10, batch_size=1, accumulation=1)
    again.load_state(run.state())
    assert again.finished
