"""Rewards built on CLIP: tiny models in the published layouts against forwards written from the definitions."""

import copy
import json
import math
import os
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from alignprop.pixels import from_pil
from alignprop.rewards import REWARDS, check_scores, clip, hpsv2, load_reward, openclip
from pictures import directional_derivatives, photograph, waves

NAMES = ["clip-score", "pickscore", "hpsv2", "hpsv2.1", "laion-aesthetic"]
PROMPTS = ["a cat", "two red cars under a very very very long bridge"]  # the second is cut off
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
CONTEXT, EMBED, SIZE, PATCH = 24, 24, 56, 14
WIDTHS = {"visual.": 48, "": 32}
LAYERS = {"visual.": 3, "": 2}


# The published layouts, and random weights in them


def openclip_shapes(width, layers, embed, patch, grid, context, vocabulary) -> dict[str, tuple[int, ...]]:
    """Names and shapes in a file of OpenCLIP, from the definition of its model; widths and layers by prefix."""
    shapes = {
        "logit_scale": (),
        "token_embedding.weight": (vocabulary, width[""]),
        "positional_embedding": (context, width[""]),
        "text_projection": (width[""], embed),
        "ln_final.weight": (width[""],),
        "ln_final.bias": (width[""],),
        "visual.conv1.weight": (width["visual."], 3, patch, patch),
        "visual.class_embedding": (width["visual."],),
        "visual.positional_embedding": (grid**2 + 1, width["visual."]),
        "visual.proj": (width["visual."], embed),
        **{
            f"visual.{norm}.{kind}": (width["visual."],)
            for norm in ("ln_pre", "ln_post")
            for kind in ("weight", "bias")
        },
    }
    for prefix, count in layers.items():
        w = width[prefix]
        block = {
            "ln_1.weight": (w,),
            "ln_1.bias": (w,),
            "attn.in_proj_weight": (3 * w, w),
            "attn.in_proj_bias": (3 * w,),
            "attn.out_proj.weight": (w, w),
            "attn.out_proj.bias": (w,),
            "ln_2.weight": (w,),
            "ln_2.bias": (w,),
            "mlp.c_fc.weight": (4 * w, w),
            "mlp.c_fc.bias": (4 * w,),
            "mlp.c_proj.weight": (w, 4 * w),
            "mlp.c_proj.bias": (w,),
        }
        for n in range(count):
            shapes |= {f"{prefix}transformer.resblocks.{n}.{name}": shape for name, shape in block.items()}
    return shapes


def random_weights(shapes, seed):
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        if name == "logit_scale":
            weights[name] = torch.tensor(math.log(90.0))
        elif re.search(r"ln_\w+\.weight|norm.*weight", name):
            weights[name] = 1 + 0.2 * noise
        elif len(shape) == 1:
            weights[name] = 0.3 * noise
        else:
            weights[name] = noise / math.sqrt(math.prod(shape[1:]))
    return weights


def tiny_shapes():
    return openclip_shapes(WIDTHS, LAYERS, EMBED, PATCH, SIZE // PATCH, CONTEXT, len(VOCABULARY))


def to_transformers(weights):
    """The same weights by the names of transformers' CLIPModel, written apart from the library's own conversion."""
    rules = [
        (r"^visual\.transformer\.resblocks", "vision_model.encoder.layers"),
        (r"^transformer\.resblocks", "text_model.encoder.layers"),
        (r"ln_(\d)", r"layer_norm\1"),
        (r"mlp\.c_fc", "mlp.fc1"),
        (r"mlp\.c_proj", "mlp.fc2"),
        (r"attn\.out_proj", "self_attn.out_proj"),
        (r"^token_embedding", "text_model.embeddings.token_embedding"),
        (r"^positional_embedding$", "text_model.embeddings.position_embedding.weight"),
        (r"^ln_final", "text_model.final_layer_norm"),
        (r"^visual\.conv1", "vision_model.embeddings.patch_embedding"),
        (r"^visual\.class_embedding", "vision_model.embeddings.class_embedding"),
        (r"^visual\.positional_embedding$", "vision_model.embeddings.position_embedding.weight"),
        (r"^visual\.ln_pre", "vision_model.pre_layrnorm"),
        (r"^visual\.ln_post", "vision_model.post_layernorm"),
    ]
    converted = {}
    for name, weight in weights.items():
        if name in ("text_projection", "visual.proj"):
            converted["text_projection.weight" if name[0] == "t" else "visual_projection.weight"] = (
                weight.T.contiguous()
            )
            continue
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        if "in_proj_" in name:
            for letter, part in zip("qkv", weight.chunk(3), strict=True):
                converted[name.replace("attn.in_proj_", f"self_attn.{letter}_proj.")] = part.clone()
        else:
            converted[name] = weight
    return converted


# The forward of CLIP from its definition, with OpenCLIP's fused attention


def exact_gelu(x):
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def quick_gelu(x):
    return x * torch.sigmoid(1.702 * x)


def norm(x, weights, name):
    return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-5)


def blocks(x, weights, prefix, heads, gelu, mask=None):
    """x has shape (places, B, width)."""
    for n in range(LAYERS[prefix]):
        w = {
            name.split(f"resblocks.{n}.")[1]: weight
            for name, weight in weights.items()
            if name.startswith(f"{prefix}transformer.resblocks.{n}.")
        }
        y = norm(x, w, "ln_1")
        attended, _ = F.multi_head_attention_forward(
            y, y, y, y.shape[-1], heads, w["attn.in_proj_weight"], w["attn.in_proj_bias"], None, None, False, 0.0,
            w["attn.out_proj.weight"], w["attn.out_proj.bias"], training=False, need_weights=False, attn_mask=mask,
        )  # fmt: skip
        x = x + attended
        hidden = gelu(F.linear(norm(x, w, "ln_2"), w["mlp.c_fc.weight"], w["mlp.c_fc.bias"]))
        x = x + F.linear(hidden, w["mlp.c_proj.weight"], w["mlp.c_proj.bias"])
    return x


def embed_pixels(weights, pixels, heads, gelu):
    patches = F.conv2d(pixels, weights["visual.conv1.weight"], stride=PATCH).flatten(2).permute(2, 0, 1)
    token = weights["visual.class_embedding"].expand(1, len(pixels), -1)
    x = torch.cat([token, patches]) + weights["visual.positional_embedding"][:, None]
    x = blocks(norm(x, weights, "visual.ln_pre"), weights, "visual.", heads, gelu)
    return F.normalize(norm(x[0], weights, "visual.ln_post") @ weights["visual.proj"], dim=-1)


def embed_prompt(weights, prompt, heads, gelu):
    """Tokens are cut to the context, end in the end of text, and are filled up with zeros as OpenCLIP does."""
    tokens = tokenise(prompt)
    tokens = torch.tensor(tokens + [0] * (CONTEXT - len(tokens)))
    x = weights["token_embedding.weight"][tokens] + weights["positional_embedding"]
    mask = torch.full((CONTEXT, CONTEXT), -math.inf).triu(1)
    x = norm(blocks(x[:, None], weights, "", heads, gelu, mask)[:, 0], weights, "ln_final")
    return F.normalize(
        x[tokens.argmax()] @ weights["text_projection"], dim=-1
    )  # the end of text has the highest number


def cosines(weights, pixels, prompts, heads, gelu):
    texts = torch.stack([embed_prompt(weights, prompt, heads, gelu) for prompt in prompts])
    return (embed_pixels(weights, pixels, heads, gelu) * texts).sum(-1)


# A tokenizer of letters, whose last tokens are those of the start and the end, as in CLIP

LETTERS = [chr(code) for code in range(97, 123)]
VOCABULARY = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]


def tokenise(prompt):
    letters = [letter for word in prompt.split() for letter in (*word[:-1], f"{word[-1]}</w>")]
    numbers = [VOCABULARY.index(letter) for letter in letters]
    return [len(VOCABULARY) - 2, *numbers[: CONTEXT - 2], len(VOCABULARY) - 1]


# Folders as published


def clip_config(gelu) -> CLIPConfig:
    both = {"hidden_act": gelu, "projection_dim": EMBED, "num_attention_heads": 4}
    ends = {"bos_token_id": len(VOCABULARY) - 2, "eos_token_id": 2}  # 2: what published configurations say
    text = {"hidden_size": WIDTHS[""], "intermediate_size": 4 * WIDTHS[""], "num_hidden_layers": LAYERS[""]}
    text |= {"vocab_size": len(VOCABULARY), "max_position_embeddings": CONTEXT} | ends
    width = WIDTHS["visual."]
    vision = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": LAYERS["visual."]}
    vision |= {"image_size": SIZE, "patch_size": PATCH}
    return CLIPConfig(text_config=text | both, vision_config=vision | both, projection_dim=EMBED)


def write_processor(folder, size=SIZE):
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = CLIPTokenizer(vocab={token: n for n, token in enumerate(VOCABULARY)}, merges=[])
    tokenizer.save_pretrained(folder)
    processor = {"do_resize": True, "size": size, "resample": 3, "do_center_crop": True, "crop_size": size}
    processor |= {"do_normalize": True, "image_mean": MEAN, "image_std": STD}
    processor["feature_extractor_type"] = "CLIPFeatureExtractor"  # as OpenAI's models name it
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))


def write_clip(folder, gelu, seed):
    """A CLIPModel of transformers; returns its weights in OpenCLIP's layout."""
    weights = random_weights(tiny_shapes(), seed)
    write_processor(folder)
    clip_config(gelu).save_pretrained(folder)
    save_file(to_transformers(weights), folder / "model.safetensors", {"format": "pt"})
    return weights


PREDICTOR_SHAPES = {0: (1024, EMBED), 2: (128, 1024), 4: (64, 128), 6: (16, 64), 7: (1, 16)}


def predictor_weights():
    shapes = {f"layers.{n}.weight": shape for n, shape in PREDICTOR_SHAPES.items()}
    return random_weights(shapes | {f"layers.{n}.bias": shape[:1] for n, shape in PREDICTOR_SHAPES.items()}, seed=5)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Folders and their weights."""
    root = tmp_path_factory.mktemp("published")
    weights = {
        "clip": write_clip(root / "clip", "quick_gelu", seed=1),
        "pick": write_clip(root / "pick", "gelu", seed=2),
        "predictor": predictor_weights(),
    }
    write_processor(root / "processor")
    (root / "laion").mkdir()
    torch.save(weights["predictor"], root / "laion" / "sac+logos+ava1-l14-linearMSE.pth")
    (root / "hps").mkdir()
    for seed, version in ((3, "v2"), (4, "v2.1")):  # half precision, as published
        half = {name: weight.half() for name, weight in random_weights(tiny_shapes(), seed).items()}
        torch.save({"state_dict": half, "epoch": 3, "name": "tuned"}, root / "hps" / f"HPS_{version}_compressed.pt")
        weights[version] = {name: weight.float() for name, weight in half.items()}
    for name in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"):
        (root / "pick" / name).unlink(missing_ok=True)  # PickScore's come from elsewhere
    return root, weights


@pytest.fixture(autouse=True)
def tiny_vit_h_14(monkeypatch):
    """The ViT-H/14 of the library, only smaller: its activation, heads and everything else stay."""
    config = openclip.vit_h_14()
    small = clip_config("gelu")
    for part, sizes in (("text_config", ("vocab_size", "max_position_embeddings")), ("vision_config", ("image_size",))):
        for name in (*sizes, "hidden_size", "intermediate_size", "num_hidden_layers", "projection_dim"):
            setattr(getattr(config, part), name, getattr(getattr(small, part), name))
    config.projection_dim = EMBED
    config.text_config.eos_token_id = len(VOCABULARY) - 1
    monkeypatch.setattr(hpsv2, "vit_h_14", lambda: config)


def arguments_of(name, root):
    return {
        "clip-score": {"model": str(root / "clip")},
        "pickscore": {"model": str(root / "pick"), "processor": str(root / "processor")},
        "hpsv2": {"model": str(root / "hps"), "tokenizer": str(root / "processor")},
        "hpsv2.1": {"model": str(root / "hps"), "tokenizer": str(root / "processor")},
        "laion-aesthetic": {"model": str(root / "laion"), "clip": str(root / "clip")},
    }[name]


def load(name, published, **arguments):
    return load_reward(name, **(arguments_of(name, published[0]) | arguments))


@pytest.fixture(scope="module")
def loaded():
    return {}


@pytest.fixture
def reward(name, published, loaded):
    """Each reward is loaded once; tests get copies that have embedded no prompt."""
    if name not in loaded:
        loaded[name] = load(name, published)
    return copy.deepcopy(loaded[name])


# Preprocessing by Pillow, as the models' own


def by_processor(pictures, size=SIZE):
    processor = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size=size)
    return processor(pictures, return_tensors="pt").pixel_values


def by_letterbox(picture, size=SIZE):
    """HPS v2's: floating point pictures, the longer edge resized, filled up with black, then normalised."""
    scale = size / max(picture.size)
    width, height = (round(edge * scale) for edge in picture.size)
    square = np.zeros((3, size, size), np.float32)
    top, left = (size - height) // 2, (size - width) // 2
    for channel, plane in zip(square, picture.split(), strict=True):
        plane = Image.fromarray(np.asarray(plane, np.float32) / 255)
        resized = plane.resize((width, height), Image.Resampling.BICUBIC)
        channel[top : top + height, left : left + width] = np.asarray(resized)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return (torch.from_numpy(square) - mean) / std


def oracle(name, weights, pictures, prompts):
    if name.startswith("hpsv2"):
        pixels = torch.stack([by_letterbox(picture) for picture in pictures])
        return cosines(weights["v2.1" if name == "hpsv2.1" else "v2"], pixels, prompts, 16, exact_gelu)
    pixels = by_processor(pictures)
    if name == "pickscore":
        return 90.0 * cosines(weights["pick"], pixels, prompts, 4, exact_gelu)
    if name == "clip-score":
        return cosines(weights["clip"], pixels, prompts, 4, quick_gelu)
    x = embed_pixels(weights["clip"], pixels, 4, quick_gelu)
    for n in PREDICTOR_SHAPES:
        x = F.linear(x, weights["predictor"][f"layers.{n}.weight"], weights["predictor"][f"layers.{n}.bias"])
    return x.squeeze(-1)


# Exactness


@pytest.mark.parametrize("name", NAMES)
def test_scores_are_those_of_the_definition(name, published, reward):
    pictures = [photograph(SIZE, SIZE), photograph(600, 512).resize((SIZE, SIZE))]  # nothing to resize
    scores = reward(from_pil(pictures), PROMPTS)
    expected = oracle(name, published[1], pictures, PROMPTS)
    check_scores(scores, from_pil(pictures), name)
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=1e-5)
    assert abs(scores[0] - scores[1]) > 1e-2  # the comparison sees something


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("height, width", [(60, 60), (600, 512), (150, 223), (300, 100), (40, 31), (56, 80)])
def test_scores_are_those_of_the_models_own_preprocessing(name, height, width, published, reward):
    pictures = [photograph(height, width), photograph(height, width).rotate(180)]
    scores = reward(from_pil(pictures), PROMPTS)
    expected = oracle(name, published[1], pictures, PROMPTS)
    least = {"pickscore": 9.0, "laion-aesthetic": 0.0}.get(name, 0.1)  # a cosine of almost 0 has no per cent
    torch.testing.assert_close(scores, expected, rtol=0.01, atol=0.01 * least)
    print(f"{name} {height}x{width}: {((scores - expected).abs() / expected.abs().clamp(min=least)).max():.2%}")


@pytest.mark.parametrize(
    "height, width", [(512, 512), (600, 512), (217, 512), (1024, 768), (224, 224), (97, 61), (225, 301)]
)
def test_pixels_are_those_of_the_models_own_preprocessing(height, width, tmp_path):
    write_processor(tmp_path, 224)
    preprocess = clip.load_preprocessing(str(tmp_path), None, "model")
    picture = photograph(height, width)
    difference = preprocess(from_pil([picture])) - by_processor([picture], 224)
    print(f"{height}x{width}: {difference.abs().max():.4f}")
    assert difference.abs().max() <= 0.02
    boxed = hpsv2.preprocess(from_pil([picture]).double(), 224)[0]
    torch.testing.assert_close(boxed.float(), by_letterbox(picture, 224), atol=1e-5, rtol=0)


def test_openclip_layout_of_the_full_model_is_the_published_one():
    widths, layers = {"visual.": 1280, "": 1024}, {"visual.": 32, "": 24}
    shapes = openclip_shapes(widths, layers, 1024, 14, 16, 77, 49408)
    assert openclip.openclip_layout(openclip.vit_h_14()) == shapes
    assert sum(math.prod(shape) for shape in shapes.values()) == 986_109_441  # as OpenCLIP counts its ViT-H-14


def test_every_weight_of_openclip_is_used_once():
    weights = random_weights(tiny_shapes(), seed=0)
    model = openclip.from_openclip(weights, hpsv2.vit_h_14(), "x", "CLIP")
    expected = to_transformers(weights)
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(weight, expected[name]) for name, weight in model.state_dict().items())
    assert sum(weight.numel() for weight in expected.values()) == sum(weight.numel() for weight in weights.values())


@pytest.mark.parametrize("form", ["bare", "file", "safetensors"])
def test_hps_loads_from_files_of_every_form(form, published, tmp_path):
    root, _ = published
    whole = torch.load(root / "hps" / "HPS_v2_compressed.pt", weights_only=True)["state_dict"]
    path = tmp_path / ("weights.safetensors" if form == "safetensors" else "HPS_v2_compressed.pt")
    (save_file if form == "safetensors" else torch.save)(whole, path)
    scores = load("hpsv2", published, model=str(tmp_path if form == "bare" else path))(waves(70, 50), PROMPTS)
    torch.testing.assert_close(scores, load("hpsv2", published)(waves(70, 50), PROMPTS))


# Gradient


@pytest.mark.parametrize("name", NAMES)
def test_gradient_agrees_with_finite_differences(name, reward):
    by_autograd, by_differences = directional_derivatives(reward.double(), PROMPTS, 70, 90)
    assert by_autograd == pytest.approx(by_differences, rel=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_gradient_reaches_every_pixel_that_the_model_sees(name, reward):
    images = waves(80, 80).requires_grad_()
    reward(images, PROMPTS).sum().backward()
    assert images.grad.isfinite().all()
    assert (images.grad.abs().sum(1) > 0).float().mean() > 0.99


@pytest.mark.parametrize("name", NAMES)
def test_gradient_of_the_preprocessing_is_the_same_in_black_and_white_pictures(name, reward):
    """It is linear but for the clip of bicubic's overshoot, which passes the gradient."""
    encoder = reward.encoder if name == "laion-aesthetic" else reward.clip.images
    checks = (torch.arange(80)[:, None] // 5 + torch.arange(70) // 5) % 2
    gradients = []
    for picture in (0.5 * torch.ones(1, 3, 80, 70), checks.expand(1, 3, 80, 70).float()):
        pixels = encoder.preprocess(picture.requires_grad_())
        cotangent = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(0))
        gradients += torch.autograd.grad(pixels, picture, cotangent)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_pictures_and_weights(name, reward):
    images = waves(70, 90)
    expected = reward(images, PROMPTS)
    scale = expected.abs().max()
    torch.testing.assert_close(reward(images.bfloat16(), PROMPTS), expected, atol=0.02 * scale, rtol=0)
    halved = reward.bfloat16()(images, PROMPTS)
    torch.testing.assert_close(halved.float(), expected, atol=0.2 * scale, rtol=0)


# Prompts


@pytest.mark.parametrize("name", [name for name in NAMES if name != "laion-aesthetic"])
def test_a_batch_scores_as_its_pictures_do(name, reward):
    prompts = ["a cat", PROMPTS[1], "a cat", "an owl"]
    images = waves(60, 70, batch=4)
    together = reward(images, prompts)
    alone = torch.cat([copy.deepcopy(reward)(images[i : i + 1], prompts[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    assert (reward(images, prompts[::-1]) - together).abs().min() > 1e-3


@pytest.mark.parametrize("name", ["laion-aesthetic"])
def test_aesthetic_rating_does_not_read_the_prompt(name, reward):
    assert torch.equal(reward(waves(60, 70), PROMPTS), reward(waves(60, 70), PROMPTS[::-1]))


@pytest.mark.parametrize("name", ["clip-score"])
def test_prompts_are_embedded_once_and_train_after_an_evaluation(name, reward):
    calls = []
    reward.clip.prompts.text_model.register_forward_hook(lambda *_: calls.append(1))
    images = waves(60, 70)
    with torch.inference_mode():
        evaluated = reward(images, PROMPTS)
    trained = reward(images.requires_grad_(), PROMPTS)
    torch.testing.assert_close(trained.detach(), evaluated.clone())
    trained.sum().backward()
    assert len(calls) == 2
    assert images.grad.abs().sum() > 0


@pytest.mark.parametrize("name", NAMES)
def test_models_are_frozen_and_in_evaluation_mode(name, published):
    folder, _ = published
    module, attribute = REWARDS[name].target.split(":")
    built = getattr(__import__(module, fromlist=[attribute]), attribute)(**arguments_of(name, folder))
    assert not any(parameter.requires_grad for parameter in built.parameters())
    assert not any(part.training for part in built.modules() if not list(part.children()))
    assert next(built.parameters()).dtype == torch.float32


# Bad input


class Trap:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


def refused(message, name, published, **arguments):
    with pytest.raises(ValueError, match=message) as caught:
        load(name, published, **arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "name, argument",
    [(name, "model") for name in NAMES]
    + [("pickscore", "processor"), ("hpsv2", "tokenizer"), ("laion-aesthetic", "clip")],
)
def test_missing_folders_and_hub_ids_without_network_are_refused(name, argument, published):
    refused(f"^{argument}='/no/such' does not exist; give the folder", name, published, **{argument: "/no/such"})
    message = refused(
        f"^{argument}='nobody/nothing' could not be loaded", name, published, **{argument: "nobody/nothing"}
    )
    assert "give a folder that holds it" in message


def test_other_models_are_refused(published, tmp_path):
    _, weights = published
    write_processor(tmp_path)
    clip_config("gelu").save_pretrained(tmp_path)
    state = to_transformers(weights["clip"])
    del state["visual_projection.weight"]
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    refused(
        "is no CLIP of transformers: it lacks 1 weights such as 'visual_proj",
        "clip-score",
        published,
        model=str(tmp_path),
    )
    state = to_transformers(weights["clip"]) | {"visual_projection.weight": torch.zeros(3, 3)}
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    refused("is no CLIP of transformers", "pickscore", published, model=str(tmp_path))


@pytest.mark.parametrize(
    "change, problem",
    [
        (lambda w: w.pop("visual.proj"), "lacks 1 weights such as 'visual.proj'"),
        (lambda w: w.update(score=torch.zeros(1)), "has, beyond its own, 1 weights such as 'score'"),
        (
            lambda w: w.update({"ln_final.bias": torch.zeros(2)}),
            "has in other shapes 1 weights such as 'ln_final.bias'",
        ),
    ],
)
def test_other_openclip_models_are_refused(change, problem, published, tmp_path):
    weights = random_weights(tiny_shapes(), 0)
    change(weights)
    torch.save(weights, tmp_path / "HPS_v2_compressed.pt")
    message = refused(f"^model='{tmp_path}' is no HPS v2 checkpoint", "hpsv2", published, model=str(tmp_path))
    assert message.endswith(f"it {problem}; give the published checkpoint.")


@pytest.mark.parametrize(
    "change, problem",
    [
        (lambda w: w.pop("layers.6.bias"), "lacks 1 weights such as 'layers.6.bias'"),
        (lambda w: w.update({"layers.9.bias": torch.zeros(1)}), "1 weights such as 'layers.9.bias'"),
        (lambda w: w.update({"layers.0.weight": torch.zeros(1024, 9)}), "in other shapes 1 weights such as 'layers.0"),
    ],
)
def test_other_predictors_are_refused(change, problem, published, tmp_path):
    weights = predictor_weights()
    change(weights)
    torch.save(weights, tmp_path / "mine.pth")
    message = refused("is no LAION aesthetic", "laion-aesthetic", published, model=str(tmp_path / "mine.pth"))
    assert problem in message


@pytest.mark.parametrize(
    "name, filename",
    [
        ("hpsv2", "HPS_v2_compressed.pt"),
        ("hpsv2.1", "HPS_v2.1_compressed.pt"),
        ("laion-aesthetic", "sac+logos+ava1-l14-linearMSE.pth"),
        ("clip-score", "pytorch_model.bin"),
        ("pickscore", "pytorch_model.bin"),
    ],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_pickles_are_not_executed(name, filename, zipped, published, tmp_path):
    write_processor(tmp_path)
    clip_config("gelu").save_pretrained(tmp_path)
    sprung = tmp_path / "sprung"
    content = {"state_dict": Trap(sprung), "layers.0.weight": Trap(sprung)}
    if zipped:
        torch.save(content, tmp_path / filename)
    else:
        (tmp_path / filename).write_bytes(pickle.dumps(content, protocol=2))
    refused("^model=", name, published, model=str(tmp_path))
    assert not sprung.exists()
    with pytest.raises(FileExistsError):  # the trap works: it springs twice
        if zipped:
            torch.load(tmp_path / filename, weights_only=False)
        else:
            pickle.loads((tmp_path / filename).read_bytes())
    assert sprung.exists()


@pytest.mark.parametrize(
    "name, argument", [("pickscore", "processor"), ("hpsv2", "tokenizer"), ("clip-score", "model")]
)
def test_a_folder_without_tokenizer_is_refused(name, argument, published, tmp_path):
    """Transformers would build one that knows no word."""
    write_clip(tmp_path, "gelu", seed=0)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer_config.json").unlink()
    message = refused(f"^{argument}='{tmp_path}' ", name, published, **{argument: str(tmp_path)})
    assert "tokenizer" in message


def test_broken_files_are_refused(published, tmp_path):
    for name, filename in (("hpsv2", "HPS_v2_compressed.pt"), ("laion-aesthetic", "sac+logos+ava1-l14-linearMSE.pth")):
        (tmp_path / filename).write_bytes(b"<html>404</html>")
        refused("^model=", name, published, model=str(tmp_path))
        torch.save([1, 2], tmp_path / filename)
        refused("is no dictionary of tensors", name, published, model=str(tmp_path))


# Pinned revisions


@pytest.mark.parametrize("name", NAMES)
def test_published_checkpoints_are_pinned(name, published, monkeypatch):
    """Whatever a reward asks the hub for by default, it asks for at a commit."""
    asked = {}

    def refuse(repository, *filenames, revision=None, **_):
        asked[repository] = revision
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", refuse)
    for cls in ("AutoTokenizer", "AutoImageProcessor", "CLIPModel"):
        monkeypatch.setattr(f"transformers.{cls}.from_pretrained", refuse)
    local = arguments_of(name, published[0])
    with pytest.raises(ValueError, match="no network"):
        load_reward(name)
    for argument in local:  # one at a time from the hub
        defaults = {key: value for key, value in local.items() if key != argument}
        with pytest.raises(ValueError, match="no network"):
            load_reward(name, **defaults)
    remote = {repository: revision for repository, revision in asked.items() if not Path(repository).exists()}
    assert remote
    assert all(re.fullmatch("[0-9a-f]{40}", revision or "") for revision in remote.values()), remote


def test_a_revision_of_ones_own_goes_before_the_pinned_one(monkeypatch):
    asked = []

    def refuse(repository, *_, revision=None, **__):
        asked.append((repository, revision))
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", refuse)
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda *_, **__: None)
    for arguments in ({"revision": "main"}, {"model": "me/mine"}, {"model": "me/mine", "revision": "v2"}):
        with pytest.raises(ValueError, match="no network"):
            load_reward("hpsv2", **arguments)
    assert asked == [("xswu/HPSv2", "main"), ("me/mine", None), ("me/mine", "v2")]
