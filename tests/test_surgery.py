"""Gradient surgery: the rules against derivations of their own, and steps against rewards run one at a time."""

import itertools
import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

import alignprop
import distributed_worker as worker
import tiny
from alignprop.cli import app
from alignprop.config import Config, ConfigError, load_config
from alignprop.config.building import build
from alignprop.estimators import DDPO, RWR, AlignProp, Estimate, LeapAlign, ReFL, RewardGradient
from alignprop.regularisation import Regularisation
from alignprop.rewards import Clamped, Normalised, WeightedSum
from alignprop.seams import CHECKPOINTING_MODES
from alignprop.surgery import RULES, Surgery, inner_products, mgda, pcgrad
from alignprop.trainer import Trainer
from alignprop.truncation import Last, Uniform
from test_regularisation import EACH
from test_rollout import relative
from test_trainer import callbacks, metrics_of_resumed, redness, trainer, weights

EXACT = {"rel": 1e-9, "abs": 1e-9}

# The rules, on a handful of numbers


def vectors(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def some_vectors(min_size=2, max_size=4):
    """Small whole numbers: zero, equal, opposite and dependent gradients are common among them."""
    shape = st.tuples(st.integers(min_size, max_size), st.integers(1, 5))
    number = st.integers(-8, 8)
    return shape.flatmap(
        lambda s: st.lists(st.lists(number, min_size=s[1], max_size=s[1]), min_size=s[0], max_size=s[0]).map(
            lambda rows: vectors(*rows)
        )
    )


def operated(rule, gradients, *arguments):
    return rule(gradients @ gradients.T, *arguments) @ gradients


def orders_of(seed, count):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randperm(count, generator=generator).tolist() for _ in range(count)]


def pcgrad_by_hand(gradients, orders):
    """Algorithm 1 of arXiv 2001.06782, on the vectors themselves."""
    total = torch.zeros_like(gradients[0])
    for place, order in enumerate(orders):
        projected = gradients[place].clone()
        for other in order:
            if other != place and projected @ gradients[other] < -1e-12:
                against = gradients[other] / gradients[other].norm()
                projected = projected - (projected @ against) * against
        total += projected
    return total


def shortest_by_hand(gradients):
    """The least distance from 0 of any face of the hull: the foot of the perpendicular, where it is in the face."""
    feet = []
    for size in range(1, len(gradients) + 1):
        for face in itertools.combinations(gradients, size):
            corner, edges = face[0], torch.stack([*face[1:], torch.zeros_like(face[0])]) - face[0]
            edges = edges[:-1]
            shares = -torch.linalg.pinv(edges.T) @ corner if size > 1 else torch.zeros(0).double()
            if (shares >= -1e-12).all() and shares.sum() <= 1 + 1e-12:
                feet.append(corner + shares @ edges)
    return min(feet, key=torch.Tensor.norm)


def close(one, other):
    return torch.allclose(one, other, rtol=1e-9, atol=1e-9)


def test_pcgrad_of_two_conflicting_gradients():
    """Each loses its share along the other: [2, 0] - [1, -1] and [-1, 1] - [-1, 0], half a turn of a pencil apart."""
    found = operated(pcgrad, vectors([2, 0], [-1, 1]), [[0, 1], [1, 0]])
    assert close(found, torch.tensor([1.0, 1.0]).double() + torch.tensor([0.0, 1.0]).double())


@given(some_vectors(), st.integers(0, 99))
@settings(deadline=None)
def test_pcgrad_is_its_algorithm(gradients, seed):
    orders = orders_of(seed, len(gradients))
    assert close(operated(pcgrad, gradients, orders), pcgrad_by_hand(gradients, orders))


@given(some_vectors(), st.integers(0, 99))
@settings(deadline=None)
def test_without_a_conflict_pcgrad_is_the_sum_to_the_last_bit(gradients, seed):
    agreeing = gradients.abs()
    found = pcgrad(agreeing @ agreeing.T, orders_of(seed, len(agreeing)))
    assert torch.equal(found, torch.ones(len(agreeing)).double())


@given(some_vectors(2, 2))
@settings(deadline=None)
def test_pcgrad_of_two_goes_against_neither(gradients):
    found = operated(pcgrad, gradients, [[1], [0]])
    assert (gradients @ found >= -1e-9).all()


@given(some_vectors())
@settings(deadline=None)
def test_pcgrad_grows_with_its_gradients_and_knows_no_length_of_what_it_projects_on(gradients):
    orders = orders_of(0, len(gradients))
    products = gradients @ gradients.T
    assert close(pcgrad(1e6 * products, orders), pcgrad(products, orders))
    if products[0, 1] < 0:
        longer = torch.ones(len(gradients)).double()
        longer[1] = 10
        mine, wide = ([[1]] + [[]] * (len(gradients) - 1)), longer[:, None] * gradients
        rest = gradients[1:].sum(0)
        expected = operated(pcgrad, gradients, mine) - rest + wide[1:].sum(0)
        assert close(operated(pcgrad, wide, mine), expected)


def test_the_order_of_three_matters():
    gradients = vectors([1, 0], [-1, 1], [-1, -2])
    found = {
        tuple(operated(pcgrad, gradients, [list(order)] * 3).tolist()) for order in itertools.permutations(range(3))
    }
    assert len(found) > 1


@pytest.mark.parametrize(
    ("one", "other", "share"),
    [
        ([3, 0], [0, 1], 1 / 10),  # the longer of two at a right angle has the smaller share, |b|^2 / (|a|^2 + |b|^2)
        ([2, 0], [-1, 1], 4 / 10),  # (b - a) . b / |a - b|^2
        ([2, 1], [1, 0], 0),  # the shorter one is the shortest of all
        ([1, 2], [1, 2], None),  # identical: any share
        ([1, 2], [-1, -2], 1 / 2),
        ([1, 2], [-3, -6], 3 / 4),
        ([0, 0], [1, 2], 0),  # what does not move has no say
    ],
)
def test_mgda_of_two(one, other, share):
    gradients = vectors(one, other)
    found = mgda(gradients @ gradients.T)
    assert found.sum().item() == pytest.approx(1)
    if share is not None:
        assert found.tolist() == pytest.approx([share, 1 - share], **EXACT)
    else:
        assert close(found @ gradients, gradients[0])


@given(some_vectors())
@settings(deadline=None, max_examples=200)
def test_mgda_is_the_shortest_vector_of_the_hull(gradients):
    found, moving = mgda(gradients @ gradients.T), gradients[gradients.any(1)]
    result = found @ gradients
    if not len(moving):
        assert not found.any()
        return
    assert (found >= 0).all() and found.sum().item() == pytest.approx(1)
    assert not found[~gradients.any(1)].any()
    assert close(result, shortest_by_hand(moving))
    assert (result.norm() <= moving.norm(dim=1) + 1e-9).all()
    along = gradients @ result
    assert along[found > 0].tolist() == pytest.approx([(result @ result).item()] * int((found > 0).sum()), **EXACT)
    assert (moving @ result >= result @ result - 1e-9).all()


def test_mgda_of_three_on_a_grid():
    """Every mixture in steps of 1/400."""
    torch.manual_seed(0)
    steps = torch.arange(401).double() / 400
    for _ in range(5):
        gradients = torch.randn(3, 4, dtype=torch.float64) + 0.3
        shares = torch.stack([*torch.meshgrid(steps, steps, indexing="ij"), torch.zeros(401, 401)], -1).view(-1, 3)
        shares = shares[shares.sum(1) <= 1]
        shares[:, 2] = 1 - shares.sum(1)
        best = (shares @ gradients).norm(dim=1).min()
        assert best - 1e-2 < operated(mgda, gradients).norm() <= best


@pytest.mark.parametrize("ratio", [1e-6, 1e6])
def test_mgda_of_lengths_that_are_far_apart(ratio):
    gradients = vectors([1, 2, 0], [0.5 * ratio, -ratio, 0.1 * ratio])
    result, (a, b) = operated(mgda, gradients), gradients
    share = ((b - a) @ b / ((a - b) @ (a - b))).item()
    assert 0 < share < 1
    assert relative(result, share * a + (1 - share) * b) < 1e-9


@given(some_vectors())
@settings(deadline=None)
def test_mgda_grows_with_its_gradients(gradients):
    products = gradients @ gradients.T
    assert close(mgda(1e-6 * products) @ gradients, mgda(products) @ gradients)


def test_many_dependent_gradients_have_a_shortest_vector():
    torch.manual_seed(1)
    gradients = torch.randn(12, 2, dtype=torch.float64) + torch.tensor([3.0, 0.0], dtype=torch.float64)
    result = operated(mgda, gradients)
    assert (gradients @ result).min().item() == pytest.approx((result @ result).item())


def test_inner_products_are_those_of_the_whole(monkeypatch):
    monkeypatch.setattr("alignprop.surgery._CHUNK", 7)
    gradients = torch.randn(3, 40)
    assert close(inner_products(gradients), gradients.double() @ gradients.double().T)


# Steps of a tiny pipeline


def brightness(images, prompts):
    return images.mean((1, 2, 3))


def greenness(images, prompts):
    return images[:, 1].mean((1, 2))


def unevenness(images, prompts):
    return images.flatten(1).std(1)


ENOUGH = 0.5438
"""Of green: some pictures are above."""


def objective(*names):
    """Shaped in every way; green conflicts with both others."""
    normalised = Normalised(redness)
    normalised.load_state({"mean": 0.02, "variance": 0.04, "num_updates": 1})
    terms = {"red": (normalised, 0.7), "green": (Clamped(greenness, ENOUGH), 2.0), "even": (unevenness, -3.0)}
    chosen = {name: terms[name] for name in names or terms}
    return WeightedSum({n: reward for n, (reward, _) in chosen.items()}, {n: w for n, (_, w) in chosen.items()})


NAMES = list(objective().weights)


def run_of(*names, dropout=0.3, dtype=torch.float64, **changes):
    run = trainer(dtype=dtype, reward=objective(*names), dropout=dropout, **changes)
    noise = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for value in run.parameters.values():
            value.add_(0.05 * torch.randn(value.shape, generator=noise).to(value))
    return run


def gradient(run, seed=0):
    """The gradient of a step, what is told of it, and the step's estimates."""
    descend, values = run.descent(), list(run.parameters.values())
    (estimates,) = run._updates(descend)
    facts = descend.complete(values, torch.Generator().manual_seed(seed))
    return torch.cat([value.grad.flatten() for value in values]).detach(), facts, estimates


def alone(**changes):
    return torch.stack([gradient(run_of(name, **changes))[0] for name in NAMES])


BY_HAND = {
    "pcgrad": lambda gradients: pcgrad_by_hand(gradients, orders_of(0, len(gradients))),
    "mgda": shortest_by_hand,
}


@pytest.mark.parametrize("name", EACH)
def test_a_step_is_the_surgery_of_the_gradients_of_runs_with_one_reward(name):
    """Two micro-batches, dropout, and rewards that are clamped, normalised and negative."""
    rows = alone(estimator=EACH[name])
    together, _, _ = gradient(run_of(estimator=EACH[name]))
    assert relative(together, rows.sum(0)) < 1e-9
    for rule, by_hand in BY_HAND.items():
        found, facts, _ = gradient(run_of(estimator=EACH[name], combination=rule))
        assert relative(found, by_hand(rows)) < 1e-9
        assert relative(found, together) > 1e-2
        pairs = [torch.cosine_similarity(a, b, 0).item() for a, b in itertools.combinations(rows, 2)]
        assert facts["gradient_cosine"] == pytest.approx(sum(pairs) / 3)
        assert facts["gradient_conflicts"] == pytest.approx(sum(pair < 0 for pair in pairs) / 3)
        assert facts["gradient_conflicts"] > 0
        factors = torch.tensor([facts["gradient_factors"][name] for name in NAMES], dtype=torch.float64)
        assert relative(factors @ rows, found) < 1e-9


def test_the_rewards_of_these_tests_are_shaped():
    run = run_of()
    shares = run.train_step()["clamped"]
    assert 0 < shares["green"] < 1


@pytest.mark.parametrize("estimator", [AlignProp(Last(3)), LeapAlign()], ids=["window", "leaps"])
def test_every_checkpointing_mode_gives_the_same_gradient(estimator):
    found = {}
    for mode in CHECKPOINTING_MODES:
        changed = type(estimator)(**{**vars(estimator), "checkpointing": mode})
        found[mode], _, _ = gradient(run_of(estimator=changed, combination="pcgrad"))
    for mode, each in found.items():
        assert relative(each, found["none"]) < 1e-12, mode


@pytest.mark.parametrize("name", EACH)
def test_denoiser_calls_are_counted(name, monkeypatch):
    for regularisation in (Regularisation(), Regularisation(l2=1.0)):
        run = run_of(estimator=EACH[name], combination="mgda", accumulation=1, regularisation=regularisation)
        forward, calls = run.pipeline.unet.forward, []
        monkeypatch.setattr(
            run.pipeline.unet, "forward", lambda *a, f=forward, c=calls, **k: (c.append(1), f(*a, **k))[1]
        )
        _, _, estimates = gradient(run)
        assert sum(estimate.calls for estimate in estimates) == len(calls)


@pytest.mark.parametrize("estimator", [AlignProp(Last(2)), LeapAlign()], ids=["window", "leaps"])
def test_a_penalty_is_added_and_not_projected(estimator):
    penalised = {"estimator": estimator, "regularisation": Regularisation(kl=20.0, l2=50.0)}
    rows = alone(estimator=estimator)
    penalty = gradient(run_of(**penalised))[0] - rows.sum(0)
    assert penalty.norm() > 0.1 * rows.sum(0).norm()
    for rule, by_hand in BY_HAND.items():
        found, facts, _ = gradient(run_of(combination=rule, **penalised))
        assert relative(found, by_hand(rows) + penalty) < 1e-8
        _, plain, _ = gradient(run_of(combination=rule, estimator=estimator))
        assert facts["gradient_factors"] == pytest.approx(plain["gradient_factors"])


def test_a_pretraining_loss_is_added_and_not_projected(tmp_path):
    for shade in (40, 200):
        Image.new("RGB", (16, 16), (shade, 80, 120)).save(tmp_path / f"a_{shade}.png")
    plain, pretrained = ReFL(late_steps=2), ReFL(late_steps=2, images=str(tmp_path), pretraining_weight=0.1)
    rows = alone(estimator=plain)
    loss = gradient(run_of(estimator=pretrained))[0] - rows.sum(0)
    found, _, _ = gradient(run_of(estimator=pretrained, combination="pcgrad"))
    assert loss.norm() > 0.01 * rows.sum(0).norm()
    assert relative(found, pcgrad_by_hand(rows, orders_of(0, 3)) + loss) < 1e-8


def test_the_bound_of_a_denoising_step_is_of_each_reward():
    bound = {"regularisation": Regularisation(max_step_grad_norm=1e-3), "estimator": AlignProp(Last(3))}
    found, _, estimates = gradient(run_of(combination="pcgrad", **bound))
    assert relative(found, pcgrad_by_hand(alone(**bound), orders_of(0, 3))) < 1e-9
    assert 0 < estimates[0].facts["step_clip_fraction"] < 1


def test_the_sum_is_what_it_was():
    """To the last bit, against the formula written out: one loss, one backward pass."""
    run, by_hand = run_of(dtype=torch.float32, dropout=0.0), run_of(dtype=torch.float32, dropout=0.0)
    run.estimator = AlignProp(Last(2))
    found, facts, _ = gradient(run)
    for micro_batch in (0, 1):
        prompts, seeds = by_hand.batch(micro_batch)
        pixels = by_hand.sampler.rollout(prompts, seeds, 2).pixels
        red = (redness(pixels, prompts) - 0.02) / 0.04**0.5
        green, even = greenness(pixels, prompts).clamp(max=ENOUGH), unevenness(pixels, prompts)
        scores = torch.stack([0.7 * red, 2.0 * green, -3.0 * even]).sum(0)
        (-0.25 * scores).sum().backward()
    expected = [torch.zeros_like(v) if v.grad is None else v.grad for v in by_hand.parameters.values()]
    assert torch.equal(found, torch.cat([each.flatten() for each in expected]))
    assert facts == {}


def test_a_step_that_nothing_opposes_is_that_of_the_sum():
    agreeing = {"reward": WeightedSum({"a": brightness, "b": lambda i, p: brightness(i, p)}, {"a": 1.0, "b": 2.0})}
    found, plain = (gradient(trainer(dtype=torch.float64, combination=c, **agreeing))[0] for c in ("pcgrad", "sum"))
    assert relative(found, plain) < 1e-12


# What is held in memory


class Marked(torch.autograd.Function):
    """Holds something as long as its graph lives."""

    @staticmethod
    def forward(ctx, images, marker):
        ctx.marker = marker
        return images.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


class Marker:
    pass


def test_a_rewards_graph_is_gone_before_the_next_is_made_and_the_chains_after_the_last_pass():
    markers = []

    def marked(images, prompts):
        assert not any(marker() for marker in markers)
        marker = Marker()
        markers.append(weakref.ref(marker))
        return Marked.apply(images, marker).mean((1, 2, 3))

    run = trainer(combination="mgda", reward=WeightedSum({"a": marked, "b": marked}, {"a": 1.0, "b": -1.0}))
    values = list(run.parameters.values())
    prompts, seeds = run.batch(0)
    rollout = run.sampler.rollout(prompts, seeds, 2)
    Surgery("mgda", ["a", "b"], values)(run.objective, rollout, prompts, 1.0)
    assert len(markers) == 2 and not any(marker() for marker in markers)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(rollout.pixels.sum(), values, allow_unused=True)
    assert all(value.grad is None for value in values)


# Runs


@pytest.mark.parametrize("combination", RULES)
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, combination):
    def run(path):
        return run_of(
            dtype=torch.float32,
            combination=combination,
            steps=4,
            estimator=AlignProp(Uniform()),
            callbacks=callbacks(path),
        )

    lines = metrics_of_resumed(tmp_path, run)
    assert {"gradient_cosine", "gradient_conflicts", "gradient_factors"} <= lines[-1].keys()
    assert list(lines[-1]["gradient_factors"]) == NAMES


def test_the_order_is_drawn_from_seed_and_step(monkeypatch):
    seen = []
    monkeypatch.setitem(RULES, "pcgrad", lambda products, g: (seen.append(g.initial_seed()), products.new_ones(3))[1])
    for seed in (0, 0, 1):
        run = run_of(combination="pcgrad", seed=seed, dtype=torch.float32)
        run.train_step(), run.train_step()
    assert seen[:2] == seen[2:4] and len(set(seen)) == 4


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launch, str(Path(worker.__file__)), str(folder), "surgery"],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("combination", RULES)
def test_two_processes_have_the_gradient_of_one(two_processes, combination):
    first, second = (torch.load(two_processes / f"{combination}-{rank}.pt") for rank in (0, 1))
    assert torch.equal(first["gradient"], second["gradient"]) and first["facts"] == second["facts"]
    found, facts, _ = gradient(worker.with_surgery(combination, 2))
    assert relative(first["gradient"], found) < 1e-10
    for name, value in facts["gradient_factors"].items():
        assert first["facts"]["gradient_factors"][name] == pytest.approx(value, rel=1e-9)
    half, _, _ = gradient(worker.with_surgery(combination, 1))
    assert relative(half, found) > 1e-3
    for name, value in first["weights"].items():
        assert torch.equal(value, second["weights"][name])


@pytest.mark.parametrize("combination", RULES)
def test_the_loss_scale_of_fp16_changes_nothing(combination):
    """The same rule on gradients that are rounded, scaled by 2**16 and scaled back."""
    changes = {"combination": combination, "dropout": 0.0, "call": tiny.CALL, "estimator": AlignProp(Last(2))}
    half, single = run_of(dtype=torch.float16, **changes), run_of(dtype=torch.float32, **changes)
    half.pipeline.vae.to(torch.float32)
    assert half._loss_scale() > 1
    (found, facts, _), (expected, same, _) = gradient(half), gradient(single)
    assert torch.cosine_similarity(found, expected, 0) > 0.98
    assert (found.norm() / half._loss_scale()).item() == pytest.approx(expected.norm().item(), rel=0.1)
    assert facts["gradient_cosine"] == pytest.approx(same["gradient_cosine"], abs=0.05)


def test_an_overflow_in_fp16_is_seen_by_the_scaler():
    for combination in RULES:
        huge = WeightedSum({"a": lambda i, p: redness(i, p) * 1e30, "b": brightness}, {"a": 1.0, "b": 1.0})
        run = trainer(dtype=torch.float16, reward=huge, combination=combination)
        run.pipeline.vae.to(torch.float32)
        before, scale = weights(run), run._loss_scale()
        metrics = run.train_step()
        assert metrics["grad_norm"] is None and metrics["gradient_cosine"] is None
        assert run._loss_scale() == scale / 2
        assert all(torch.equal(value, before[name]) for name, value in run.parameters.items())


# What is refused


def test_combinations_without_effect_are_refused_in_code():
    two = objective("red", "green")
    for changes, sentence in (
        ({"reward": redness}, "combination=mgda needs at least two rewards, and there is redness: add another, or use"),
        (
            {"reward": two, "estimator": DDPO()},
            "combination=mgda compares .*, and estimator DDPO backpropagates none: use",
        ),
        (
            {"reward": two, "estimator": RWR()},
            "combination=mgda compares .*, and estimator RWR backpropagates none: use",
        ),
        ({"reward": two, "combination": "cagrad"}, "combination=cagrad is unknown; choose one of sum, pcgrad, mgda."),
    ):
        with pytest.raises(ValueError, match=f"^{sentence}"):
            trainer(**{"combination": "mgda", **changes})


def test_an_estimator_with_a_backward_pass_of_its_own_is_refused():
    """It would be trained on the sum without a word."""

    class Own(RewardGradient):
        def __call__(self, sampler, reward, batch, weight):
            rollout = sampler.rollout(batch.prompts, batch.seeds, 1)
            scores = reward(rollout.pixels, batch.prompts)
            (-weight * scores).sum().backward()
            return Estimate(scores.detach(), {}, 1, 1, 1, len(scores))

    run = trainer(reward=objective("red", "green"), estimator=Own(), combination="pcgrad")
    with pytest.raises(
        ValueError, match=r"^combination=pcgrad needs an estimator that .*base\.ascend; use combination=sum"
    ):
        run.train_step()


@pytest.mark.parametrize(
    ("recipe", "override", "sentence"),
    [
        (
            "emoji",
            "combination=pcgrad",
            "combination=pcgrad needs at least two rewards, and there is emoji-aesthetic: add",
        ),
        ("emoji-combined", "combination=cagrad", "combination=cagrad needs one of 'sum', 'pcgrad' or 'mgda'"),
        (
            "emoji-combined",
            "estimator.name=ddpo",
            "combination=mgda compares the gradients of rewards, and estimator ddpo",
        ),
        (
            "emoji-combined",
            "estimator.name=rwr",
            "combination=mgda compares the gradients of rewards, and estimator rwr",
        ),
    ],
)
def test_combinations_without_effect_are_told_before_anything_loads(recipe, override, sentence):
    with pytest.raises(ConfigError) as error:
        load_config(recipe, ["combination=mgda", override])
    assert error.value.problems[0].startswith(sentence) and len(error.value.problems) == 1


def test_the_command_line_tells_it_in_one_sentence():
    arguments = ["train", "emoji", "--set", "combination=mgda"]
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
    assert result.exit_code == 2
    assert "combination=mgda needs at least two rewards, and there is emoji-aesthetic: add another" in result.output


def test_the_setting_reaches_the_trainer(tmp_path):
    assert Config().combination == Trainer.combination == "sum"
    assert build(load_config("emoji-combined", ["combination=mgda"]), tmp_path).combination == "mgda"


def test_what_is_told_of_is_exported():
    assert alignprop.Regularisation is Regularisation
    assert alignprop.Optimizer is worker.test_trainer.Optimizer
    assert {"Regularisation", "Optimizer"} <= set(dir(alignprop))
