"""ImageReward against a forward written from BLIP's definition, VLM questions against transformers' own LLaVA."""

import math

import pytest
import tokenizers
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import save_file
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from alignprop.pixels import from_pil
from alignprop.rewards import image_reward, load_reward
from alignprop.rewards.checkpoints import check_layout
from pictures import SHAPES, directional_derivatives, photograph, randomise, waves

PROMPTS = ["a cat", "two red cars " * 20]  # the second is cut off after 35 tokens by ImageReward


def word_tokenizer(folder, words, single, **special):
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=single, special_tokens=[(word, words.index(word)) for word in single.split() if word in words]
    )
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", **special)
    fast.save_pretrained(folder)
    return fast


# ImageReward: the published layout


def blip_layout(*, width, depth, patch, places, text_width, text_depth, vocabulary, positions, inner=4):
    """Names and shapes in `ImageReward.pt`, from the definitions of BLIP and of the head."""

    def linear(name, old, new):
        return {f"{name}.weight": (new, old), f"{name}.bias": (new,)}

    def norm(name, size):
        return {f"{name}.weight": (size,), f"{name}.bias": (size,)}

    image, text = "blip.visual_encoder", "blip.text_encoder"
    layout = {
        f"{image}.cls_token": (1, 1, width),
        f"{image}.pos_embed": (1, places + 1, width),
        f"{image}.patch_embed.proj.weight": (width, 3, patch, patch),
        f"{image}.patch_embed.proj.bias": (width,),
        **norm(f"{image}.norm", width),
        f"{text}.embeddings.position_ids": (1, positions),
        f"{text}.embeddings.word_embeddings.weight": (vocabulary, text_width),
        f"{text}.embeddings.position_embeddings.weight": (positions, text_width),
        **norm(f"{text}.embeddings.LayerNorm", text_width),
        **linear("blip.vision_proj", width, 256),
        **linear("blip.text_proj", text_width, 256),
    }
    for n in range(depth):
        block = f"{image}.blocks.{n}"
        layout |= norm(f"{block}.norm1", width) | norm(f"{block}.norm2", width)
        layout |= linear(f"{block}.attn.qkv", width, 3 * width) | linear(f"{block}.attn.proj", width, width)
        layout |= linear(f"{block}.mlp.fc1", width, inner * width) | linear(f"{block}.mlp.fc2", inner * width, width)
    for n in range(text_depth):
        layer = f"{text}.encoder.layer.{n}"
        for attention, seen in (("attention", text_width), ("crossattention", width)):
            layout |= linear(f"{layer}.{attention}.self.query", text_width, text_width)
            layout |= linear(f"{layer}.{attention}.self.key", seen, text_width)
            layout |= linear(f"{layer}.{attention}.self.value", seen, text_width)
            layout |= linear(f"{layer}.{attention}.output.dense", text_width, text_width)
            layout |= norm(f"{layer}.{attention}.output.LayerNorm", text_width)
        layout |= linear(f"{layer}.intermediate.dense", text_width, inner * text_width)
        layout |= linear(f"{layer}.output.dense", inner * text_width, text_width)
        layout |= norm(f"{layer}.output.LayerNorm", text_width)
    widths = [text_width, 1024, 128, 64, 16, 1]
    for place, old, new in zip((0, 2, 4, 6, 7), widths, widths[1:], strict=False):
        layout |= linear(f"mlp.layers.{place}", old, new)
    return layout


WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "cat", "two", "red", "cars"]
TINY = {"width": 128, "depth": 2, "patch": 8, "places": 16, "text_width": 64, "text_depth": 2, "positions": 40}
LAYOUT = blip_layout(**TINY, vocabulary=len(WORDS) + 2)


def random_weights(layout):
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, shape in layout.items():
        noise = torch.randn(shape, generator=generator)
        scale = 1 / math.sqrt(math.prod(shape[1:])) if len(shape) > 1 and "embed" not in name else 0.3
        weights[name] = (1.0 if "norm" in name.lower() and name.endswith("weight") else 0.0) + scale * noise
    weights["blip.text_encoder.embeddings.position_ids"] = torch.arange(40)[None]
    return weights


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Folder of a tiny ImageReward in the published layout with a tokenizer, and its weights."""
    folder = tmp_path_factory.mktemp("image-reward")
    weights = random_weights(LAYOUT)
    torch.save(weights, folder / "ImageReward.pt")
    special = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    word_tokenizer(folder, WORDS, "[CLS] $A [SEP]", **special)
    return str(folder), weights


def load(folder, **settings):
    return load_reward("image-reward", **{"model": folder, "tokenizer": folder, **settings})


def attention(x, seen, weights, names, heads, mask=0.0):
    """Multi-head attention of `x` to `seen` by its definition; `names` of query, key, value and output."""
    query, key, value = (
        F.linear(states, weights[f"{name}.weight"], weights[f"{name}.bias"]).unflatten(-1, (heads, -1)).transpose(1, 2)
        for states, name in zip((x, seen, seen), names[:3], strict=True)
    )
    mixed = (query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1]) + mask).softmax(-1) @ value
    return F.linear(mixed.transpose(1, 2).flatten(2), weights[f"{names[3]}.weight"], weights[f"{names[3]}.bias"])


def by_definition(weights, pixels, tokens, mask):
    """ImageReward's score of prepared pictures, from the published names."""

    def linear(name, x):
        return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def norm(name, x, eps):
        return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], eps)

    weights = dict(weights)
    image, text = "blip.visual_encoder", "blip.text_encoder"
    x = F.conv2d(pixels, weights[f"{image}.patch_embed.proj.weight"], weights[f"{image}.patch_embed.proj.bias"], 8)
    x = x.flatten(2).transpose(1, 2)
    x = torch.cat([weights[f"{image}.cls_token"].expand(len(x), -1, -1), x], 1) + weights[f"{image}.pos_embed"]
    for n in range(2):
        block = f"{image}.blocks.{n}"
        for kind in ("weight", "bias"):  # the fused projection: thirds of query, key and value
            for part, third in zip("qkv", weights[f"{block}.attn.qkv.{kind}"].chunk(3), strict=True):
                weights[f"{part}.{kind}"] = third
        y = norm(f"{block}.norm1", x, 1e-6)
        x = x + attention(y, y, weights, ["q", "k", "v", f"{block}.attn.proj"], heads=2)
        y = linear(f"{block}.mlp.fc1", norm(f"{block}.norm2", x, 1e-6))
        x = x + linear(f"{block}.mlp.fc2", F.gelu(y))
    patches = norm(f"{image}.norm", x, 1e-6)

    z = weights[f"{text}.embeddings.word_embeddings.weight"][tokens]
    z = z + weights[f"{text}.embeddings.position_embeddings.weight"][: tokens.shape[1]]
    z = norm(f"{text}.embeddings.LayerNorm", z, 1e-12)
    unseen = torch.where(mask.bool(), 0.0, -1e30)[:, None, None]
    for n in range(2):
        layer = f"{text}.encoder.layer.{n}"
        for kind, seen, hidden in (("attention", None, unseen), ("crossattention", patches, 0.0)):
            names = [f"{layer}.{kind}.self.{part}" for part in ("query", "key", "value")]
            y = attention(z, z if seen is None else seen, weights, [*names, f"{layer}.{kind}.output.dense"], 1, hidden)
            z = norm(f"{layer}.{kind}.output.LayerNorm", y + z, 1e-12)
        y = linear(f"{layer}.output.dense", F.gelu(linear(f"{layer}.intermediate.dense", z)))
        z = norm(f"{layer}.output.LayerNorm", y + z, 1e-12)
    score = z[:, 0]
    for place in (0, 2, 4, 6, 7):
        score = linear(f"mlp.layers.{place}", score)
    return (score[:, 0] - 0.16717362830052426) / 1.0333394966054072


TOKENS = torch.zeros(2, 35, dtype=torch.long)
TOKENS[0, :4] = torch.tensor([2, 4, 5, 3])
TOKENS[1] = torch.tensor([2, *[6, 7, 8] * 11, 3])
MASK = (TOKENS != 0).long()


@pytest.mark.parametrize("file", ["ImageReward.pt", "weights.safetensors"])
def test_image_reward_is_the_definition(published, tmp_path, file):
    folder, weights = published
    model = folder
    if file.endswith("safetensors"):
        model = str(tmp_path / file)
        save_file(weights, model)
    reward = load(folder, model=model)
    images = waves(32, 32)
    pixels = reward.preprocess(images)
    scores = reward(images, PROMPTS)
    torch.testing.assert_close(scores, by_definition(weights, pixels, TOKENS, MASK), atol=1e-5, rtol=1e-5)
    assert abs(scores[0] - scores[1]) > 0.01
    alone = torch.cat([reward(images[i : i + 1], PROMPTS[i : i + 1]) for i in range(2)])
    torch.testing.assert_close(scores, alone, atol=1e-5, rtol=0)


def test_image_reward_takes_photographs_as_published(published):
    folder, weights = published
    reward = load(folder)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    for shape in SHAPES:
        picture = photograph(*shape)
        pixels = processor(picture, return_tensors="pt")["pixel_values"]
        assert (reward.preprocess(from_pil([picture])) - pixels).abs().max() <= 0.02
        expected = by_definition(weights, pixels, TOKENS[:1], MASK[:1]).item()
        assert reward(from_pil([picture]), PROMPTS[:1]).item() == pytest.approx(expected, rel=0.01)


def test_gradient_of_image_reward_agrees_with_finite_differences(published):
    gradient, difference = directional_derivatives(load(published[0]).double(), PROMPTS)
    assert abs(gradient) > 1e-3
    assert gradient == pytest.approx(difference, rel=1e-6)


def test_every_published_weight_has_its_place_at_full_size():
    layout = blip_layout(
        width=1024, depth=24, patch=16, places=196, text_width=768, text_depth=12, vocabulary=30524, positions=512
    )
    assert sum(4 * math.prod(shape) for shape in layout.values()) == pytest.approx(1.79e9, abs=0.005e9)
    used = {name: shape for name, shape in layout.items() if not name.startswith(image_reward.UNUSED)}
    tensors = {image_reward.rename(name): torch.empty(shape, device="meta") for name, shape in used.items()}
    assert len(tensors) == len(used) == len(layout) - 5
    vision, text, features = image_reward.sizes(tensors, "m")
    assert (vision.num_attention_heads, text.num_attention_heads, vision.image_size) == (16, 12, 224)
    with torch.device("meta"):
        ours = torch.nn.ModuleDict(
            {
                "vision": transformers.BlipVisionModel(vision),
                "text": transformers.BlipTextModel(text, add_pooling_layer=False),
                "head": image_reward.head(features),
            }
        )
    check_layout(tensors, {name: weight.shape for name, weight in ours.state_dict().items()}, "m", "layout")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"mlp.layers.7.bias": None}, "is no ImageReward checkpoint: it lacks 1 weights such as 'head.7.bias'"),
        ({"mlp.layers.0.weight": None}, "is no ImageReward checkpoint: it lacks 'head.0.weight'"),
        ({"blip.text_decoder.bias": torch.zeros(1)}, "has, beyond its own, 1 weights such as 'blip.text_decoder.bias'"),
        ({"mlp.layers.4.bias": torch.zeros(7)}, "has in other shapes 1 weights such as 'head.4.bias'"),
    ],
)
def test_image_reward_refuses_other_layouts(published, tmp_path, change, message):
    folder, weights = published
    changed = {name: tensor for name, tensor in {**weights, **change}.items() if tensor is not None}
    torch.save(changed, tmp_path / "ImageReward.pt")
    with pytest.raises(ValueError, match=message):
        load(folder, model=str(tmp_path))


def test_image_reward_refuses_what_is_not_there(published, tmp_path):
    folder, _ = published
    with pytest.raises(ValueError, match=r"model='/nowhere/x' does not exist; give the folder of a ImageReward"):
        load(folder, model="/nowhere/x")
    with pytest.raises(ValueError, match=r"could not be loaded as ImageReward checkpoint .*ImageReward.pt"):
        load(folder, model=str(tmp_path))
    with pytest.raises(ValueError, match=r"model='THUDM/ImageReward' could not be loaded .* and the network"):
        load(folder, model="THUDM/ImageReward")
    with pytest.raises(ValueError, match=r"tokenizer='/nowhere/x' does not exist"):
        load(folder, tokenizer="/nowhere/x")
    word_tokenizer(tmp_path, WORDS[:5], "[CLS] $A [SEP]", pad_token="[PAD]")
    with pytest.raises(ValueError, match=r"tokenizer=.* has a tokenizer of 5 tokens, where the model knows 11"):
        load(folder, tokenizer=str(tmp_path))


# LLaVA

CHAT = (
    "{% for message in messages %}USER: {% for part in message['content'] %}"
    "{{ '<image> ' if part['type'] == 'image' else part['text'] }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)
VLM_WORDS = [
    *("[PAD]", "[UNK]", "<s>", "<image>", "USER:", "ASSISTANT:", "yes", "Yes", "no", "No"),
    *("Does", "this", "picture", "show", "Answer", "or", "no.", "a", "cat?", "two", "red", "cars?", "cars", "it"),
]


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    """Folder and model of a tiny LLaVA."""
    folder = tmp_path_factory.mktemp("llava")
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2, image_size=32,
            patch_size=8,
        ),
        text_config=transformers.LlamaConfig(
            vocab_size=len(VLM_WORDS), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0,
            bos_token_id=2, eos_token_id=0,
        ),
        image_token_id=3,
    )  # fmt: skip
    model = randomise(transformers.LlavaForConditionalGeneration(config))
    model.save_pretrained(folder)
    pictures = LlavaImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    transformers.LlavaProcessor(
        pictures,
        word_tokenizer(folder, VLM_WORDS, "<s> $A", pad_token="[PAD]", additional_special_tokens=["<image>"]),
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT,
    ).save_pretrained(folder)
    pictures.save_pretrained(folder)
    return str(folder), model


def asked(folder, model, picture, prompt, words=("yes", "Yes")):
    """Log-probability of the words by the model's own processor and forward, one picture at a time."""
    processor = transformers.AutoProcessor.from_pretrained(folder)
    text = f"USER: <image> Does this picture show {prompt}? Answer yes or no. ASSISTANT:"
    inputs = processor(images=[picture], text=[text], return_tensors="pt")
    assert (inputs["input_ids"] == 3).sum() == 16 and inputs["input_ids"][0, -1] == VLM_WORDS.index("ASSISTANT:")
    probabilities = model(**inputs).logits[0, -1].softmax(-1)
    return probabilities[[VLM_WORDS.index(word) for word in words]].sum().log().item()


def test_the_answer_has_the_probability_that_the_model_gives_it(llava):
    folder, model = llava
    reward = load_reward("vlm-question", model=folder)
    assert reward.answers == [6, 7]
    pictures = [photograph(32, 32), photograph(40, 32).crop((0, 8, 32, 40))]  # of the model's size: no rounding
    prompts = ["a cat", "two red cars"]
    expected = torch.tensor([asked(folder, model, *pair) for pair in zip(pictures, prompts, strict=True)])
    torch.testing.assert_close(reward(from_pil(pictures), prompts), expected, atol=1e-5, rtol=0)
    swapped = reward(from_pil(pictures), prompts[::-1])
    assert (swapped - expected).abs().min() > 1e-3
    other = load_reward("vlm-question", model=folder, answer="no", question="Does this picture show {prompt}? or no.")
    assert (other(from_pil(pictures), prompts) - expected).abs().min() > 1e-3


def test_vlm_takes_photographs_as_its_own_processor_does(llava):
    folder, model = llava
    reward = load_reward("vlm-question", model=folder)
    for shape in SHAPES:
        picture = photograph(*shape)
        expected = asked(folder, model, picture, "a cat")
        assert reward(from_pil([picture]), ["a cat"]).item() == pytest.approx(expected, rel=0.01)


def test_gradient_of_the_answer_agrees_with_finite_differences(llava):
    reward = load_reward("vlm-question", model=llava[0]).double()
    # Its normalisation is computed in float32, hence the large step.
    gradient, difference = directional_derivatives(reward, ["a cat", "two red cars"], step=3e-4)
    assert abs(gradient) > 1e-3
    assert gradient == pytest.approx(difference, rel=1e-2)


def test_vlm_in_half_precision_scores_nearly_the_same(llava):
    images, prompts = waves(40, 40), ["a cat", "two red cars"]
    single, half = (
        load_reward("vlm-question", model=llava[0], dtype=d)(images, prompts) for d in ("float32", "bfloat16")
    )
    assert half.dtype == torch.float32
    assert 0 < (single - half).abs().max() < 0.1


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"answer": "definitely"}, "answer='definitely' is not one token of the model; give one short word"),
        ({"dtype": "int8"}, "dtype='int8' is not known; give one of float32, bfloat16, float16"),
        ({"model": "/nowhere/x"}, "model='/nowhere/x' does not exist; give the folder of a LLaVA"),
        ({"model": "nobody/nothing"}, "model='nobody/nothing' could not be loaded as LLaVA"),
    ],
)
def test_vlm_refuses(llava, arguments, message):
    with pytest.raises(ValueError, match=message):
        load_reward("vlm-question", **{"model": llava[0], **arguments})


def test_vlm_of_another_family_is_refused(tmp_path):
    transformers.Idefics3Config().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is of the type 'idefics3', no LLaVA of transformers"):
        load_reward("vlm-question", model=str(tmp_path))
