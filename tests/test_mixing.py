"""Mixtures of adapters: exact sums, compressed sums, weights by denoising step, sweeps."""

import json
import math

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import tiny
from alignprop.adapter_files import DIFFUSERS_FILE, PEFT_FILE, SECOND_FILE, facts_of, load_adapter
from alignprop.adapters import Adapter, Full, Lora
from alignprop.cli import app
from alignprop.config import read_config
from alignprop.drawing import settings_of
from alignprop.export import Update, read_updates, save_kohya
from alignprop.measures import evaluate
from alignprop.mixing import (
    Member,
    Mixture,
    StepWeights,
    load_mixture,
    mix,
    read_adapter,
    save_mixture,
    save_schedule,
    sweep,
)
from alignprop.mixing.files import require_alike
from alignprop.mixing.schedule import SCHEDULE_FILE, read_schedule
from alignprop.mixing.sweep import grid
from alignprop.mixing.sweep_page import undominated
from alignprop.rewards import load_reward
from alignprop.rollout import Sampler
from alignprop.spec import PipelineSpec
from zoo.video import ROWS, wan_2_2

SEEDS = [0, 1]
TWO = [(0.7, 0.3), (1.0, 0.0), (0.0, 0.0), (-0.5, 1.5), (2.0, 0.25)]
CONVOLUTIONS = ("to_q", "to_v", "conv1", "proj_in")
AS_PEFT = PipelineSpec(("unet",), "vae", lora_files=False)


def pictures(pipeline, **arguments):
    return Sampler(pipeline, {**tiny.CALL, **arguments}).sample(tiny.PROMPTS, SEEDS)


def saved(folder, make=tiny.stable_diffusion, seed=1, spec=None, facts=None, scale=0.2, **lora):
    """An adapter with an effect, in a folder."""
    adapter = Adapter(make(), Lora(**lora), spec=spec)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters.values():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    adapter.save(folder, facts)
    return folder


def mixed(folders, weights, out, rank=None):
    """Read, mix and write; returns the mixture."""
    stored = [read_adapter(folder) for folder in folders]
    members = [
        Member(str(i), each.updates, weight) for i, (each, weight) in enumerate(zip(stored, weights, strict=True))
    ]
    mixture = mix(members, rank)
    save_mixture(mixture, stored[0].layout, out, {})
    return mixture


def random_updates(seed, shapes, rank, scale=1.0):
    """Updates of layers by name: (outputs, inputs, *kernel)."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator)

    return {
        name: Update(draw(rank, *inputs), draw(outputs, rank, *(1 for _ in inputs[1:])), scale)
        for name, (outputs, *inputs) in shapes.items()
    }


def dense(update):
    """The full update of a layer in float64, from the definition."""
    return update.scale * update.up.flatten(1).double() @ update.down.flatten(1).double()


SHAPES = {"unet.a": (12, 8), "unet.b": (6, 20), "unet.conv": (8, 5, 3, 3)}


def three(weights, **changes):
    """Members of other ranks and scales, the last of which adapts one layer alone."""
    updates = [
        random_updates(0, SHAPES, 3, 0.5),
        random_updates(1, SHAPES, 2, 4.0),
        random_updates(2, {"unet.b": SHAPES["unet.b"]}, 4, -1.5),
    ]
    return [Member(str(i), each, weight) for i, (each, weight) in enumerate(zip(updates, weights, strict=True))]


@pytest.mark.parametrize("weights", [(0.7, 0.3, 1.0), (-0.5, 1.5, 0.0), (1.0, 0.0, 0.0), (3.0, -2.0, 0.25)])
def test_a_mixture_is_the_dense_sum(weights):
    members = three(weights)
    mixture = mix(members)
    assert set(mixture.updates) == set(SHAPES)
    for name, update in mixture.updates.items():
        parts = [m.weight * dense(m.updates[name]) for m in members if name in m.updates]
        torch.testing.assert_close(dense(update), sum(parts), rtol=1e-6, atol=1e-6)
        assert update.down.shape[1:] == members[0].updates[name].down.shape[1:]
    assert (mixture.error, mixture.errors) == (0.0, {})
    assert mixture.base_weight == pytest.approx(1 - sum(weights))


def deltas(weights):
    return torch.cat([dense(update).flatten() for _, update in sorted(mix(three(weights)).updates.items())])


def test_mixtures_are_linear_in_the_weights():
    u, v = (0.7, -0.3, 1.1), (0.2, 2.0, -0.4)
    both = deltas(tuple(3 * a - b for a, b in zip(u, v, strict=True)))
    torch.testing.assert_close(both, 3 * deltas(u) - deltas(v), rtol=1e-6, atol=2e-5)
    torch.testing.assert_close(deltas((0.5, 0, 0)), 0.5 * deltas((1, 0, 0)), rtol=0, atol=1e-6)
    torch.testing.assert_close(deltas((-1, 0, 0)), -deltas((1, 0, 0)), rtol=0, atol=1e-6)
    # The published code had the weight in both factors: a half gave a quarter, and minus one gave one.
    squared = {name: Update(0.5 * u.down, 0.5 * u.up, u.scale) for name, u in random_updates(0, SHAPES, 3, 0.5).items()}
    wrong = torch.cat([dense(squared[name]).flatten() for name in sorted(SHAPES)])
    torch.testing.assert_close(wrong, 0.25 * deltas((1, 0, 0)), rtol=0, atol=1e-6)
    assert (wrong - deltas((0.5, 0, 0))).abs().max() > 0.5


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_the_error_is_that_of_the_discarded_singular_values_and_of_the_pictures_own_updates(rank):
    members = three((0.7, -0.6, 0.3))
    exact, compressed = mix(members), mix(members, rank)
    lost = total = 0.0
    for name in SHAPES:
        full, close = dense(exact.updates[name]), dense(compressed.updates[name])
        values = torch.linalg.svdvals(full)
        best, norm = values[rank:].norm().item(), values.norm().item()
        assert (full - close).norm().item() == pytest.approx(best, rel=1e-4, abs=1e-5)
        assert compressed.errors[name] == pytest.approx(best / norm, rel=1e-5)
        assert len(compressed.updates[name].down) == rank
        lost, total = lost + best**2, total + norm**2
    assert compressed.error == pytest.approx(math.sqrt(lost / total), rel=1e-5)
    assert compressed.errors[compressed.worst] == max(compressed.errors.values())


def test_the_error_counts_the_layers_that_need_no_compression():
    members = [Member("a", random_updates(0, {"x": (9, 7)}, 3) | random_updates(1, {"y": (9, 7)}, 2, 3.0), 1.0)]
    mixture = mix(members, 2)
    assert list(mixture.errors) == ["x"]
    full = {name: dense(update) for name, update in members[0].updates.items()}
    lost = (full["x"] - dense(mixture.updates["x"])).norm()
    assert mixture.error == pytest.approx((lost / torch.cat([*full.values()]).norm()).item(), rel=1e-5)


def test_a_rank_that_suffices_is_exact():
    members = three((0.7, -0.6, 0.3))
    exact, same = mix(members), mix(members, 9)
    assert (same.rank, same.error, same.errors) == (9, 0.0, {})
    for name in SHAPES:
        assert torch.equal(dense(same.updates[name]), dense(exact.updates[name]))
    # An adapter mixed with itself needs no more than its own rank.
    twice = mix([Member("a", members[0].updates, 0.4), Member("b", members[0].updates, 0.6)], 3)
    assert twice.error < 1e-7
    for name, update in twice.updates.items():
        torch.testing.assert_close(dense(update), dense(members[0].updates[name]), rtol=1e-5, atol=1e-5)


def test_adapters_in_half_precision_are_added_up_in_float32():
    halves = [
        {
            name: Update(u.down.bfloat16(), u.up.bfloat16(), u.scale)
            for name, u in random_updates(seed, SHAPES, 2).items()
        }
        for seed in (0, 1)
    ]
    members = [
        Member(str(i), updates, weight) for i, (updates, weight) in enumerate(zip(halves, (0.7, -0.3), strict=True))
    ]
    for mixture in (mix(members), mix(members, 3)):
        assert {update.up.dtype for update in mixture.updates.values()} == {torch.float32}
    for name, update in mix(members).updates.items():
        expected = sum(member.weight * dense(member.updates[name]) for member in members)
        torch.testing.assert_close(dense(update), expected, rtol=1e-6, atol=1e-6)


def test_mixing_changes_nothing_that_it_is_given_and_draws_no_random_numbers():
    members, state = three((0.7, 0.3, 1.0)), torch.get_rng_state()
    before = [{name: update.up.clone() for name, update in member.updates.items()} for member in members]
    mix(members, 2)
    assert torch.equal(torch.get_rng_state(), state)
    for member, kept in zip(members, before, strict=True):
        assert all(torch.equal(update.up, kept[name]) for name, update in member.updates.items())


@pytest.mark.parametrize(
    ("members", "rank", "message"),
    [
        ([], None, "nothing to mix"),
        (three((1.0, math.nan, 0.0)), None, "weight=nan of 1 needs to be a finite number"),
        (three((math.inf, 1.0, 0.0)), None, "weight=inf of 0"),
        (three((1.0, 1.0, 1.0)), 0, "rank=0 needs to be at least 1"),
        ([Member("a", random_updates(0, SHAPES, 1), 1.0)] * 2, None, "named a, a"),
        (
            [
                Member("a", random_updates(0, {"x": (3, 4)}, 1), 1.0),
                Member("b", random_updates(0, {"x": (3, 5)}, 1), 1.0),
            ],
            None,
            "different models: x is 3 × 4 in one and 3 × 5 in the other",
        ),
    ],
)
def test_mixtures_without_sense_are_refused(members, rank, message):
    with pytest.raises(ValueError, match=message):
        mix(members, rank)


CASES = {
    "alphas": (tiny.stable_diffusion, {"rank": 2, "alpha": 8.0}, {"rank": 3}),
    "layers": (tiny.stable_diffusion, {"targets": ("to_q",)}, {"targets": ("to_k", "to_v")}),
    "convolutions": (tiny.stable_diffusion, {"targets": CONVOLUTIONS}, {"targets": CONVOLUTIONS, "rank": 2}),
    "text": (tiny.stable_diffusion, {"text_encoders": True, "alpha": 2.0}, {"rank": 2}),
    "text-3": (tiny.stable_diffusion_3, {"rank": 2, "alpha": 1.0}, {"text_encoders": True}),
}


@pytest.fixture(scope="module", params=CASES)
def pair(request, tmp_path_factory):
    """A case's pipeline, two adapters of it, and pictures by diffusers' own weights."""
    make, first, second = CASES[request.param]
    path = tmp_path_factory.mktemp("pair")
    folders = [saved(path / "a", make, 1, **first), saved(path / "b", make, 2, **second)]
    both = make()
    for name, folder in zip("ab", folders, strict=True):
        both.load_lora_weights(folder, adapter_name=name)

    def theirs(*weights):
        both.set_adapters(["a", "b"], list(weights))
        return pictures(both)

    return make, folders, theirs


@pytest.mark.parametrize("weights", [(0.7, 0.3), (-0.5, 1.5)])
def test_pictures_are_those_of_diffusers_own_weights(pair, tmp_path, weights):
    make, folders, theirs = pair
    mixed(folders, weights, tmp_path)
    ours = make()
    ours.load_lora_weights(tmp_path)
    expected = theirs(*weights)
    torch.testing.assert_close(pictures(ours), expected, rtol=0, atol=2e-5)
    assert (expected - theirs(*reversed(weights))).abs().max() > 1e-3


def test_ends_are_the_members_and_the_base_model_and_our_loader_reads_them(pair, tmp_path):
    make, folders, _ = pair
    for weights, folder in (((1.0, 0.0), folders[0]), ((0.0, 1.0), folders[1]), ((0.0, 0.0), None)):
        place = tmp_path / str(weights)
        mixed(folders, weights, place)
        member, ours = make(), make()
        if folder is not None:
            load_adapter(member, folder)
        assert load_mixture(ours, place) == {}
        torch.testing.assert_close(pictures(ours), pictures(member), rtol=0, atol=2e-6)


def test_a_compressed_mixture_is_loaded_too_and_is_near_as_its_error_says(pair, tmp_path):
    make, folders, theirs = pair
    mixture = mixed(folders, (0.6, 0.4), tmp_path, rank=2)
    assert mixture.rank == 2
    back = mix([Member("back", read_adapter(tmp_path).updates, 1.0)])
    exact = mix(
        [Member(str(i), read_adapter(f).updates, w) for i, (f, w) in enumerate(zip(folders, (0.6, 0.4), strict=True))]
    )
    lost = math.sqrt(
        sum((dense(back.updates[n]) - dense(exact.updates[n])).square().sum().item() for n in exact.updates)
    )
    total = math.sqrt(sum(dense(update).square().sum().item() for update in exact.updates.values()))
    assert lost / total == pytest.approx(mixture.error, rel=1e-4, abs=1e-6)
    ours = make()
    ours.load_lora_weights(tmp_path)
    assert (pictures(ours) - theirs(0.6, 0.4)).abs().max() < 0.5


def test_the_file_has_one_rank_a_part_a_scale_of_1_and_goes_on_to_other_programs(tmp_path):
    folders = [
        saved(tmp_path / "a", rank=2, alpha=6.0, targets=("to_q",), facts={"step": 3}),
        saved(tmp_path / "b", rank=3, text_encoders=True),
    ]
    mixture = mixed(folders, (0.5, 2.0), tmp_path / "ab")
    tensors = load_file(tmp_path / "ab" / DIFFUSERS_FILE)
    assert {value.dtype for value in tensors.values()} == {torch.float32}
    ranks = {(name.split(".")[0], len(value)) for name, value in tensors.items() if ".lora_A." in name}
    assert ranks == {("unet", 5), ("text_encoder", 3)}
    for name, update in read_updates(tmp_path / "ab").items():  # what the export reads
        assert update.scale == 1
        torch.testing.assert_close(update.delta.double(), dense(mixture.updates[name]), rtol=0, atol=1e-6)
    kohya = load_file(save_kohya(tmp_path / "ab", tmp_path / "kohya.safetensors", "StableDiffusionPipeline"))
    assert {value.item() for name, value in kohya.items() if name.endswith(".alpha")} == {5.0, 3.0}


def test_the_scale_is_what_peft_makes_of_the_settings(tmp_path):
    """Per-layer ranks and alphas and rank-stabilised scales, as PEFT itself reads them."""
    from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model

    first, second = saved(tmp_path / "x"), tmp_path / "y"
    pipeline = tiny.stable_diffusion()
    config = LoraConfig(
        r=4,
        lora_alpha=2,
        target_modules=["to_q", "to_v"],
        rank_pattern={"to_q": 2},
        alpha_pattern={"attn2.to_q": 7, "attn1.to_v": 3},
        use_rslora=True,
        init_lora_weights=False,
    )
    inject_adapter_in_model(config, pipeline.unet, "default")
    state = get_peft_model_state_dict(pipeline.unet, adapter_name="default")
    pipeline.save_lora_weights(second, unet_lora_layers=state, unet_lora_adapter_metadata=config.to_dict())
    updates = read_adapter(second).updates
    scales = {}
    for name, layer in pipeline.unet.named_modules():
        if hasattr(layer, "scaling") and layer.scaling:
            assert updates[f"unet.{name}"].scale == pytest.approx(layer.scaling["default"])
            torch.testing.assert_close(dense(updates[f"unet.{name}"]).float(), layer.get_delta_weight("default"))
            scales[name.split(".")[-2:][0] + name.split(".")[-1]] = layer.scaling["default"]
    assert len(set(scales.values())) == 4
    mixed([first, second], (0.0, 1.0), tmp_path / "xy")
    theirs, ours = tiny.stable_diffusion(), tiny.stable_diffusion()
    theirs.load_lora_weights(second)
    ours.load_lora_weights(tmp_path / "xy")
    torch.testing.assert_close(pictures(ours), pictures(theirs), rtol=0, atol=2e-5)


def test_a_scale_that_is_not_1_is_written_into_the_factors(tmp_path):
    updates = random_updates(0, {"unet.x": (4, 5)}, 2, 3.0)
    save_mixture(Mixture(updates, {}, 2, 0.0, {}), "diffusers", tmp_path, {})
    torch.testing.assert_close(dense(read_adapter(tmp_path).updates["unet.x"]), dense(updates["unet.x"]))


def test_files_of_diffusers_own_training_scripts_are_read(tmp_path):
    older = {}
    for name, value in load_file(saved(tmp_path / "a") / DIFFUSERS_FILE).items():
        older[name.replace(".lora_A.", ".lora.down.").replace(".lora_B.", ".lora.up.")] = value
    (tmp_path / "older").mkdir()
    save_file(older, tmp_path / "older" / DIFFUSERS_FILE)
    mixed([tmp_path / "older"], (1.0,), tmp_path / "same")
    theirs, ours = tiny.stable_diffusion(), tiny.stable_diffusion()
    theirs.load_lora_weights(tmp_path / "older")
    ours.load_lora_weights(tmp_path / "same")
    torch.testing.assert_close(pictures(ours), pictures(theirs), rtol=0, atol=2e-6)


def test_peft_folders_are_mixed_into_one(tmp_path):
    folders = [saved(tmp_path / name, seed=i, spec=AS_PEFT, rank=2 + i, alpha=4.0) for i, name in enumerate("ab")]
    mixed(folders, (0.7, 0.3), tmp_path / "ab")
    both, ours, peft = (tiny.stable_diffusion() for _ in range(3))
    for i, folder in enumerate(folders):
        load_adapter(both, folder, spec=AS_PEFT, adapter_name=str(i))
    both.unet.set_adapters(["0", "1"], [0.7, 0.3])
    expected = pictures(both)
    load_adapter(ours, tmp_path / "ab", spec=AS_PEFT)
    torch.testing.assert_close(pictures(ours), expected, rtol=0, atol=2e-5)
    peft.unet = PeftModel.from_pretrained(peft.unet, tmp_path / "ab")
    torch.testing.assert_close(pictures(peft), expected, rtol=0, atol=2e-5)
    assert (tmp_path / "ab" / PEFT_FILE).is_file()


def test_both_denoisers_of_wan_are_mixed(tmp_path):
    row = next(row for row in ROWS if row.build is wan_2_2)

    def make():
        return row.build(torch.float32)

    folders = [saved(tmp_path / name, make, i + 1, rank=2 + i) for i, name in enumerate("ab")]
    mixed(folders, (0.25, 0.75), tmp_path / "ab")
    assert (tmp_path / "ab" / SECOND_FILE).is_file()
    parts = {name.split(".")[0] for name in read_adapter(tmp_path / "ab").updates}
    assert parts == {"transformer", "transformer_2"}
    both, ours = make(), make()
    for i, folder in enumerate(folders):
        load_adapter(both, folder, adapter_name=str(i))
    both.set_adapters(["0", "1"], [0.25, 0.75])
    load_adapter(ours, tmp_path / "ab")
    drawn = [Sampler(pipeline, row.call).sample(row.prompts, SEEDS) for pipeline in (ours, both, make())]
    torch.testing.assert_close(drawn[0], drawn[1], rtol=0, atol=2e-5)
    assert (drawn[1] - drawn[2]).abs().max() > 1e-3


def _tensors(folder, change):
    """Write an adapter's file again, changed."""
    tensors = load_file(folder / DIFFUSERS_FILE)
    change(tensors)
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / DIFFUSERS_FILE)


def _magnitudes(tensors):
    tensors["unet.conv.lora_magnitude_vector"] = torch.ones(3)


def _cut(tensors):
    del tensors[max(tensors)]


def _foreign(tensors):
    for name in list(tensors):
        tensors[name.replace("unet.", "diffusion_model.")] = tensors.pop(name)


def _not_finite(tensors):
    tensors[max(tensors)][0, 0] = math.nan


def _more(tensors):
    tensors["unet.conv_in.weight"] = torch.ones(3)


def _grouped(tensors):
    tensors[max(name for name in tensors if "lora_B" in name)] = torch.ones(16, 2, 1, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_magnitudes, "is a DoRA"),
        (_cut, "only one of the two factors"),
        (_foreign, "holds diffusion_model.* not diffusers' name"),
        (_not_finite, "not finite"),
        (_more, r"holds conv_in.weight .* no factor of a LoRA"),
        (_grouped, "grouped or a two-sided convolution"),
    ],
)
def test_what_is_no_plain_lora_is_refused(tmp_path, change, message):
    _tensors(saved(tmp_path), change)
    with pytest.raises(ValueError, match=message):
        read_adapter(tmp_path)


def test_other_folders_are_refused(tmp_path):
    with pytest.raises(ValueError, match=f"holds no {DIFFUSERS_FILE}"):
        read_adapter(tmp_path)
    Full().attach(tiny.stable_diffusion()).save(tmp_path / "full")
    with pytest.raises(ValueError, match="all weights of a model"):
        read_adapter(tmp_path / "full")
    (tmp_path / DIFFUSERS_FILE).write_bytes(b"cut")
    with pytest.raises(ValueError, match="cannot be read"):
        read_adapter(tmp_path)


def test_adapters_of_different_models_are_refused(tmp_path):
    def of(name, make=tiny.stable_diffusion, model="a", **changes):
        facts = {"config": {"model": {"name": model}}} if model else None
        return read_adapter(saved(tmp_path / name, make, facts=facts, **changes))

    one, same, other = of("one"), of("same", rank=2), of("other", model="b")
    unknown, third, peft = of("unknown", model=None), of("third", tiny.stable_diffusion_3), of("peft", spec=AS_PEFT)
    require_alike({"one": one, "same": same, "unknown": unknown})
    require_alike({"one": one, "other": other}, same_model=True)
    for pair, message in (
        ({"one": one, "other": other}, "one and other were trained on different models, base model a and b"),
        ({"one": one, "third": third}, "pipeline StableDiffusionPipeline and StableDiffusion3Pipeline"),
        ({"one": one, "peft": peft}, "one is stored for diffusers and peft for peft"),
    ):
        with pytest.raises(ValueError, match=message):
            require_alike(pair)
    text = of("text", text_encoders=True)
    renamed = {name.replace("text_encoder.", "text_encoder.text_model."): u for name, u in text.updates.items()}
    older = type(text)(text.folder, text.layout, renamed, text.facts)
    for pair in ({"text": text, "older": older}, {"older": older, "text": text}):
        with pytest.raises(ValueError, match="layers of a text encoder in two ways"):
            require_alike(pair)


def test_adapters_that_share_no_part_are_refused(tmp_path):
    both, unet, text = (saved(tmp_path / name, seed=i, text_encoders=True) for i, name in enumerate("but"))
    _tensors(unet, lambda tensors: [tensors.pop(name) for name in list(tensors) if name.startswith("text_encoder")])
    _tensors(text, lambda tensors: [tensors.pop(name) for name in list(tensors) if name.startswith("unet")])
    members = {folder.name: read_adapter(folder) for folder in (both, unet, text)}
    require_alike({name: members[name] for name in "bu"})
    require_alike({name: members[name] for name in "tb"})
    for names, told in {
        "ut": "u is of unet, t is of text_encoder",
        "tbu": "t is of text_encoder, b is of text_encoder and unet, u is of unet",
    }.items():
        with pytest.raises(ValueError, match=rf"no part of the model that all adapters change \({told}\): mix"):
            require_alike({name: members[name] for name in names})
    result = run("mix", unet, text, "--weights", "1,1", "--output", tmp_path / "out")
    assert result.exit_code == 1 and "There is no part of the model that all adapters change" in result.output
    assert not (tmp_path / "out").exists()


def hand_driven(make, folders, weights_by_step):
    """Pictures with diffusers' weights set before each call of the denoiser, by a hook and no callback."""
    pipeline, calls = make(), iter(weights_by_step)
    for name, folder in zip("ab", folders, strict=True):
        pipeline.load_lora_weights(folder, adapter_name=name)
    part = getattr(pipeline, "unet", None) or pipeline.transformer
    part.register_forward_pre_hook(lambda *_: pipeline.set_adapters(["a", "b"], list(next(calls))))
    return pictures(pipeline)


@pytest.mark.parametrize("make", [tiny.stable_diffusion, tiny.stable_diffusion_3])
@pytest.mark.parametrize(
    ("weights", "by_step"),
    [
        (StepWeights((1.0, 0.0), (0.0, 1.0), 0.5), [(1, 0), (1, 0), (0, 1), (0, 1)]),
        (StepWeights((1.0, -0.5), (0.2, 1.5), 0.2), [(1, -0.5), (0.2, 1.5), (0.2, 1.5), (0.2, 1.5)]),
        (StepWeights((1.0, 0.0), (0.0, 1.0), 0.5, ramp=1.0), [(1, 0), (0.75, 0.25), (0.5, 0.5), (0.25, 0.75)]),
    ],
)
def test_weights_by_step_are_those_of_a_loop_driven_by_hand(tmp_path, make, weights, by_step):
    folders = [saved(tmp_path / "a", make, 1), saved(tmp_path / "b", make, 2, rank=2)]
    assert [weights.at(step, 4) for step in range(4)] == [pytest.approx(each) for each in by_step]
    save_schedule(weights, {folder.name: read_adapter(folder) for folder in folders}, tmp_path / "ab")
    pipeline = make()
    arguments = load_mixture(pipeline, tmp_path / "ab")
    first, again = pictures(pipeline, **arguments), pictures(pipeline, **arguments)
    assert torch.equal(first, again)  # the weights of the first step are back
    expected = hand_driven(make, folders, by_step)
    torch.testing.assert_close(first, expected, rtol=0, atol=2e-6)
    assert (first - hand_driven(make, folders, by_step[::-1])).abs().max() > 1e-3


def test_an_interrupted_call_is_mended(tmp_path):
    folders = [saved(tmp_path / "a"), saved(tmp_path / "b", seed=2)]
    save_schedule(StepWeights((1.0, 0.0), (0.0, 1.0), 0.3), {f.name: read_adapter(f) for f in folders}, tmp_path / "ab")
    pipeline = tiny.stable_diffusion()
    switch = load_mixture(pipeline, tmp_path / "ab")["callback_on_step_end"]
    whole = pictures(pipeline, callback_on_step_end=switch)

    def stop(pipe, step, timestep, arguments):
        if step == 2:
            raise KeyboardInterrupt
        return switch(pipe, step, timestep, arguments)

    with pytest.raises(KeyboardInterrupt):
        pictures(pipeline, callback_on_step_end=stop)
    switch.start(pipeline)
    assert torch.equal(pictures(pipeline, callback_on_step_end=switch), whole)


def test_weights_by_step_of_peft_folders(tmp_path):
    folders = [saved(tmp_path / name, seed=i, spec=AS_PEFT) for i, name in enumerate("ab")]
    adapters = {folder.name: read_adapter(folder) for folder in folders}
    save_schedule(StepWeights((0.3, 0.6), (0.3, 0.6), 0.5), adapters, tmp_path / "ab")
    mixed(folders, (0.3, 0.6), tmp_path / "flat")
    by_step, flat = tiny.stable_diffusion(), tiny.stable_diffusion()
    arguments = load_mixture(by_step, tmp_path / "ab", spec=AS_PEFT)
    load_mixture(flat, tmp_path / "flat", spec=AS_PEFT)
    torch.testing.assert_close(pictures(by_step, **arguments), pictures(flat), rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((1.0,), (0.0, 1.0), 0.5), "1 early weights and 2 late ones"),
        (((1.0,), (0.0,), 0.0), "switch_at=0.0 needs"),
        (((1.0,), (0.0,), math.nan), "switch_at=nan needs"),
        (((1.0,), (0.0,), 0.3, 0.7), "ramp=0.7 needs 0 <= ramp <= 0.6"),
    ],
)
def test_schedules_without_sense_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        StepWeights(*arguments)


@pytest.fixture(scope="module")
def schedule_folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("schedule")
    adapters = {name: read_adapter(saved(path / name, seed=i)) for i, name in enumerate("ab")}
    save_schedule(StepWeights((1.0, 0.0), (0.0, 1.0), 0.5), adapters, path / "ab")
    return path / "ab"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(code="import os"), "code: Extra inputs"),
        (lambda d: d.update(format="else"), "format: Input should be"),
        (lambda d: d.update(switch_at="0.5"), "switch_at: Input should be a valid number"),
        (lambda d: d.update(switch_at=2.0), "switch_at=2.0 needs"),
        (lambda d: d.update(members=[]), "members: List should have at least 1"),
        (lambda d: d["members"][0].update(folder="../../a"), "members.0.folder: String should match"),
        (lambda d: d["members"][0].update(folder="member-1"), "two members share a name or a folder"),
        (lambda d: d["members"][0].update(early=math.inf), "members.0.early: Input should be a finite number"),
        (lambda d: d["members"][0].pop("late"), "members.0.late: Field required"),
    ],
)
def test_a_schedule_file_is_checked_when_it_is_read(schedule_folder, tmp_path, change, message):
    data = json.loads((schedule_folder / SCHEDULE_FILE).read_text())
    assert read_schedule(schedule_folder)[0] == StepWeights((1.0, 0.0), (0.0, 1.0), 0.5)
    change(data)
    (tmp_path / SCHEDULE_FILE).write_text(json.dumps(data))
    with pytest.raises(ValueError, match=f"cannot be used: {message}"):
        read_schedule(tmp_path)


def test_text_encoders_are_not_switched_by_step(tmp_path):
    adapters = {"a": read_adapter(saved(tmp_path / "a")), "t": read_adapter(saved(tmp_path / "t", text_encoders=True))}
    with pytest.raises(ValueError, match="t adapts a text encoder, which reads the prompt once"):
        save_schedule(StepWeights((1.0, 0.0), (0.0, 1.0), 0.5), adapters, tmp_path / "ab")
    assert not (tmp_path / "ab").exists()


def test_a_pipeline_without_the_callback_is_refused(schedule_folder, monkeypatch):
    pipeline = tiny.stable_diffusion()
    monkeypatch.setattr(type(pipeline), "__call__", lambda self, prompt: None)
    with pytest.raises(ValueError, match="StableDiffusionPipeline takes no callback_on_step_end"):
        load_mixture(pipeline, schedule_folder)


def test_grids_and_fronts():
    assert grid(2, 3, with_base=False) == [(1, 0), (0.5, 0.5), (0, 1)]
    assert grid(2, 3, with_base=True) == [(1,), (0.5,), (0,)]
    triangle = grid(3, 3, with_base=False)
    assert len(set(triangle)) == len(triangle) == 6
    assert {(1, 0, 0), (0, 1, 0), (0, 0, 1), (0.5, 0.5, 0)} <= set(triangle)
    assert all(sum(point) == 1 for point in triangle)
    assert grid(3, 3, with_base=True) == [point[:2] for point in triangle]
    assert undominated([(0, 3), (1, 2), (1, 1), (2, 1), (0, 0), (2, 1)]) == [True, True, False, True, False, True]


# The command line


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs of a tiny model as they are in their folders, for two rewards."""
    path = tmp_path_factory.mktemp("runs")
    tiny.stable_diffusion().save_pretrained(path / "model")
    for seed, (name, reward) in enumerate({"red": "redness", "bright": "brightness"}.items(), start=1):
        settings = {
            "model": {"name": str(path / "model")},
            "sampling": dict(tiny.CALL),
            "rewards": {reward: 1.0},
            "judges": ["jpeg-compressibility"],
            "prompts": {"train": ["a cat", "a dog"], "unseen": ["a fox", "an ox"]},
            "evaluation": {"images_per_prompt": 2, "seed": 5},
        }
        (path / name).mkdir()
        (path / name / "config.yaml").write_text(yaml.safe_dump(settings))
        config = read_config(path / name / "config.yaml").model_dump(mode="json")
        saved(path / name / "adapter", seed=seed, facts={"config": config}, rank=1 + seed)
    return path


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})


def succeeded(*arguments):
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result.output


def test_the_command_writes_a_mixture_with_its_recipe(runs, tmp_path):
    output = succeeded(
        "mix", runs / "red", runs / "bright" / "adapter", "--weights", "-0.5,1.2", "--output", tmp_path / "m"
    )
    assert "−0.5 × red + 1.2 × bright + 0.3 × base, rank 5, exact" in output
    facts = facts_of(tmp_path / "m")
    assert [(m["name"], m["weight"]) for m in facts["mixture"]["members"]] == [("red", -0.5), ("bright", 1.2)]
    assert (facts["mixture"]["rank"], facts["mixture"]["relative_error"]) == (5, 0.0)
    config = settings_of(tmp_path / "m")
    assert (list(config.rewards), list(config.judges)) == (["redness"], ["brightness", "jpeg-compressibility"])
    card = (tmp_path / "m" / "README.md").read_text()
    assert "| red | -0.5 |" in card
    assert "pipe.load_lora_weights('m')" in card
    pipeline, both = tiny.stable_diffusion(), tiny.stable_diffusion()
    pipeline.load_lora_weights(tmp_path / "m")
    for name in ("red", "bright"):
        both.load_lora_weights(runs / name / "adapter", adapter_name=name)
    both.set_adapters(["red", "bright"], [-0.5, 1.2])
    torch.testing.assert_close(pictures(pipeline), pictures(both), rtol=0, atol=2e-5)


def test_the_command_prints_the_error_of_a_compressed_mixture(runs, tmp_path):
    output = succeeded(
        "mix", runs / "red", runs / "bright", "--weights", "1,1", "--rank", 2, "--output", tmp_path / "m"
    )
    facts = facts_of(tmp_path / "m")["mixture"]
    assert f"relative error {100 * facts['relative_error']:.3g} %" in output
    exact = mix([Member(n, read_adapter(runs / n / "adapter").updates, 1.0) for n in ("red", "bright")], 2)
    assert facts["relative_error"] == pytest.approx(exact.error)
    assert f"of a layer's ({exact.worst})" in output.replace("\n", "")


def test_other_commands_take_mixtures_of_both_kinds(runs, tmp_path):
    succeeded("mix", runs / "red", runs / "bright", "--weights", "1,1", "--output", tmp_path / "flat")
    steps = ("--weights", "1,1", "--late-weights", "0,1", "--switch-at", 0.5)
    assert "over 0.5 of the chain" not in succeeded(
        "mix", runs / "red", runs / "bright", *steps, "--output", tmp_path / "s"
    )
    assert "arguments = load_mixture(pipe, 's')" in (tmp_path / "s" / "README.md").read_text()
    drawn = {}
    for name in ("flat", "s"):
        succeeded("sample", "-p", "a fox", "--adapter", tmp_path / name, "--output", tmp_path / f"{name}.png")
        drawn[name] = (tmp_path / f"{name}.png").read_bytes()
        found = json.loads(succeeded("evaluate", tmp_path / name, "--images-per-prompt", 1, "--json"))
        assert found["unseen"]["base"] != found["unseen"]["adapter"]
    assert drawn["flat"] != drawn["s"]


def test_the_ends_of_a_sweep_are_the_members_and_it_is_resumed(runs, tmp_path, monkeypatch):
    command = ("mix", runs / "red", runs / "bright", "--sweep", 3, "--output", tmp_path / "s")
    output = succeeded(*command)
    assert "4 points, 4 to measure, of 2 prompts × 2" in output
    found = json.loads((tmp_path / "s" / "sweep.json").read_text())
    points = {tuple(point["weights"]): point["measured"]["rewards"] for point in found["points"]}
    assert set(points) == {(0, 0), (1, 0), (0.5, 0.5), (0, 1)}
    names = ["redness", "brightness", "jpeg-compressibility"]
    rewards = {name: load_reward(name) for name in names}
    for weights, folder in (((0, 0), None), ((1, 0), runs / "red"), ((0, 1), runs / "bright")):
        pipeline = tiny.stable_diffusion()
        if folder is not None:
            load_adapter(pipeline, folder / "adapter")
        own = evaluate(Sampler(pipeline, tiny.CALL), ["a fox", "an ox"], rewards, images_per_prompt=2, seed=5)
        for name in names:
            assert points[weights][name]["mean"] == pytest.approx(own.scores[name].double().mean().item(), abs=1e-6)
    mixed([runs / name / "adapter" for name in ("red", "bright")], (0.5, 0.5), tmp_path / "half")
    pipeline = tiny.stable_diffusion()
    pipeline.load_lora_weights(tmp_path / "half")
    own = evaluate(Sampler(pipeline, tiny.CALL), ["a fox", "an ox"], rewards, images_per_prompt=2, seed=5)
    assert points[0.5, 0.5]["redness"]["mean"] == pytest.approx(own.scores["redness"].double().mean().item(), abs=1e-6)
    # The same command draws nothing, and a finer sweep only what is new.
    monkeypatch.setattr(sweep, "measured", lambda *_: pytest.fail("drawn again"))
    assert "4 points, 0 to measure" in succeeded(*command)
    monkeypatch.undo()
    finer = succeeded(*command[:4], 5, *command[5:], "--chart", "brightness,diversity", "--save-adapters")
    assert "6 points, 2 to measure" in finer
    assert (tmp_path / "s" / "adapters" / "0.75_0.25" / DIFFUSERS_FILE).is_file()
    page = (tmp_path / "s" / "sweep.html").read_text()
    assert page.count("data:image/") == 6
    assert "0.75 × red + 0.25 × bright" in page
    assert '<b>diversity</b> <span class="muted">upwards</span>, <b>brightness</b>' in page
    assert not [part for part in ("http://", "https://", "<script") if part in page]
    changed = run(*command, "--seed", 7)
    assert changed.exit_code == 2
    assert "holds another sweep (seed was 5)" in changed.output


def test_a_sweep_that_is_stopped_keeps_its_points_and_notices_an_adapter_that_was_trained_again(
    runs, tmp_path, monkeypatch
):
    """The adapter is away from its run: its header tells what to sample."""
    facts = facts_of(runs / "red" / "adapter")
    adapter = saved(tmp_path / "moved", seed=1, facts=facts)
    command = ("mix", adapter, "--sweep", 3, "--with-base", "--output", tmp_path / "s")
    measure, calls = sweep.measured, []

    def stopped(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return measure(*arguments)

    monkeypatch.setattr(sweep, "measured", stopped)
    assert run(*command).exit_code == 130
    monkeypatch.setattr(sweep, "measured", measure)
    output = succeeded(*command)
    assert "3 points, 1 to measure" in output
    assert output.count("there already") == 2
    assert "Along the line" in (tmp_path / "s" / "sweep.html").read_text()
    saved(tmp_path / "moved", seed=2, facts=facts)
    assert "holds another sweep (digests was" in run(*command).output


def test_a_sweep_to_the_base_model_and_one_over_a_triangle(runs, tmp_path):
    output = succeeded("mix", runs / "red", "--sweep", 2, "--with-base", "--output", tmp_path / "line")
    assert "2 points" in output
    assert "[2/2] red: redness" in output
    triangle = ("mix", runs / "red", runs / "bright", "--with-base", "--sweep", 2, "--images-per-prompt", 1)
    assert "3 points" in succeeded(*triangle, "--output", tmp_path / "triangle")
    assert "Along the line" not in (tmp_path / "triangle" / "sweep.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "--weights is missing"),
        (["--weights", "0.7"], 2, "--weights=0.7 has 1 numbers for 2 adapters"),
        (["--weights", "0.7,x"], 2, "--weights=0.7,x needs numbers"),
        (["--weights", "0.7,nan"], 2, "--weights=0.7,nan needs finite numbers"),
        (["--weights", "1,0", "--late-weights", "1"], 2, "--late-weights=1 has 1 numbers"),
        (["--weights", "1,0", "--switch-at", "0.5"], 2, "--switch-at is of mixtures by denoising steps"),
        (["--weights", "1,0", "--late-weights", "0,1", "--rank", "2"], 2, "--rank is of one mixture"),
        (["--weights", "1,0", "--late-weights", "0,1", "--switch-at", "1.5"], 1, "switch_at=1.5 needs"),
        (["--weights", "1,0", "--with-base"], 2, "--with-base is of a sweep: add --sweep N"),
        (["--weights", "1,0", "--rank", "0"], 1, "rank=0 needs to be at least 1"),
        (["--sweep", "3", "--weights", "1,0"], 2, "--weights is of one mixture: leave it out"),
        (["--sweep", "1"], 2, "--sweep=1 needs at least 2"),
        (["--sweep", "2", "--chart", "redness,beauty"], 2, "--chart=redness,beauty needs two of redness"),
        (["--sweep", "2", "--reward", "beauty"], 1, "beauty"),
    ],
)
def test_what_cannot_be_mixed_is_told_in_a_sentence(runs, tmp_path, arguments, code, message):
    result = run("mix", runs / "red", runs / "bright", *arguments, "--output", tmp_path / "m")
    assert (result.exit_code, "Traceback" in result.output) == (code, False), result.output
    assert message in result.output
    assert not (tmp_path / "m").exists()


def test_folders_that_do_not_fit_are_told_in_a_sentence(runs, tmp_path):
    def told(*arguments):
        result = run("mix", *arguments, "--output", tmp_path / "out")
        assert result.exit_code in (1, 2), result.output
        return result.output

    assert "An adapter is given twice" in told(runs / "red", runs / "red" / "adapter", "--weights", "1,1")
    assert f"holds no {DIFFUSERS_FILE}" in told(runs / "model", "--weights", "1")
    foreign = saved(tmp_path / "foreign")
    assert "--prompts is missing: foreign does not tell" in told(foreign, "--sweep", 2, "--with-base")
    other = saved(tmp_path / "other", facts={"config": {"model": {"name": "another"}}})
    pair = (runs / "red", other, "--weights", "1,1")
    assert "red and other were trained on different models, base model" in told(*pair)
    assert "different models" in told(runs / "red", other, "--sweep", 2)
    succeeded("mix", *pair, "--model", runs / "model", "--output", tmp_path / "known")
    assert "here are 1" in told(runs / "red", "--sweep", 2)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    assert "is not empty: give another folder" in told(runs / "red", "--weights", "0.5")
    assert "is not empty and no sweep" in told(runs / "red", "--sweep", 2, "--with-base")


def test_rewards_that_share_a_name_are_told_apart():
    from alignprop.config import Config
    from alignprop.mixing.measuring import merged_terms

    one = Config(rewards={"jpeg": {"target": "jpeg-compressibility", "weight": 2.0}}, judges=["redness"])
    two = Config(rewards={"redness": 1.0}, judges={"jpeg": {"target": "jpeg-incompressibility"}})
    terms = merged_terms({"one": one, "two": two}, ["brightness", "redness"])
    assert {name: term.target for name, term in terms.items()} == {
        "jpeg": "jpeg-compressibility",
        "redness": None,
        "jpeg of two": "jpeg-incompressibility",
        "brightness": None,
    }
