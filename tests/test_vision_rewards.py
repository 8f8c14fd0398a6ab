"""Rewards of classifiers and detectors: transformers' own forward and processors, brute force, finite differences."""

import itertools
import math
import pickle

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.convnext.image_processing_pil_convnext import ConvNextImageProcessorPil
from transformers.models.deit.image_processing_pil_deit import DeiTImageProcessorPil
from transformers.models.grounding_dino.image_processing_pil_grounding_dino import GroundingDinoImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.owlv2.image_processing_pil_owlv2 import Owlv2ImageProcessorPil
from transformers.models.owlvit.image_processing_pil_owlvit import OwlViTImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from alignprop.pixels import from_pil, resize
from alignprop.rewards import check_scores, load_reward, objects
from alignprop.rewards.checkpoints import load_tensors
from alignprop.rewards.classifier import find_label
from alignprop.rewards.preprocessing import Preprocessing, resize_rounded
from pictures import SHAPES, directional_derivatives, photograph, randomise, waves

PROMPTS = ["a cat", "two red cars"]
LABELS = {0: "tabby, tabby cat", 1: "tiger cat", 2: "crane", 3: "crane", 4: "maillot, tank suit"}


# Preprocessing: against each model's own, on a photograph

PROCESSORS = {
    "vit": ViTImageProcessorPil(),
    "clip": CLIPImageProcessorPil(),
    "deit": DeiTImageProcessorPil(),
    "dinov2": BitImageProcessorPil(size={"shortest_edge": 256}),
    "siglip": SiglipImageProcessorPil(size={"height": 384, "width": 384}),
    "blip": BlipImageProcessorPil(),
    "resnet": ConvNextImageProcessorPil(size={"shortest_edge": 224}),
    "convnext-384": ConvNextImageProcessorPil(),
    "llava": LlavaImageProcessorPil(),
    "owlvit": OwlViTImageProcessorPil(),
    "grounding-dino": GroundingDinoImageProcessorPil(size={"shortest_edge": 200, "longest_edge": 333}),
    "no resize": ViTImageProcessorPil(do_resize=False),
    "no normalisation": ViTImageProcessorPil(do_normalize=False, size={"height": 70, "width": 90}),
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_preprocessing_is_that_of_the_processor(name):
    processor = PROCESSORS[name]
    preprocess = Preprocessing.of(processor, name)
    for height, width in SHAPES:
        picture = photograph(height, width)
        expected = processor(picture, return_tensors="pt")["pixel_values"]
        ours = preprocess(from_pil([picture]))
        assert ours.shape == expected.shape
        assert (ours - expected).abs().max() <= 0.02


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [96, 300])
def test_preprocessing_of_owlv2_is_that_of_its_processor(shape, size):
    processor = Owlv2ImageProcessorPil(size={"height": size, "width": size})
    preprocess = objects.SquarePreprocessing(size, processor.image_mean, processor.image_std)
    picture = photograph(*shape)
    expected = processor(picture, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(preprocess(from_pil([picture])), expected.float(), atol=2e-5, rtol=0)


def test_a_processor_that_does_something_else_is_refused():
    with pytest.raises(ValueError, match=r"model='m' prepares pictures with Idefics3ImageProcessorPil.*write the re"):
        Preprocessing.of(Idefics3ImageProcessorPil(), "m")
    with pytest.raises(ValueError, match="does more than resize"):
        Preprocessing.of(LlavaImageProcessorPil(do_pad=True), "m")


def test_overshoot_is_clipped_and_keeps_its_gradient():
    images = torch.zeros(1, 1, 8, 8, requires_grad=True)
    with torch.no_grad():
        images[..., 4:] = 1.0
    clipped, unclipped = resize_rounded(images, (8, 24), "bicubic"), resize(images, (8, 24), "bicubic")
    assert unclipped.min() < -0.05 and unclipped.max() > 1.05
    assert clipped.min() == 0 and clipped.max() == 1
    # A clip with its own gradient, zero, would leave the pixels at the edge half dead.
    gradients = [torch.autograd.grad(resized.sum(), images)[0] for resized in (clipped, unclipped)]
    torch.testing.assert_close(*gradients)


# Classifier


def classifier_folder(folder, **settings):
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, image_size=32, patch_size=8,
        id2label=LABELS, label2id={name: number for number, name in LABELS.items()}, **settings
    )  # fmt: skip
    model = randomise(transformers.ViTForImageClassification(config))
    model.save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return str(folder), model


@pytest.mark.parametrize("label", ["tiger cat", "Tabby", 4, "4"])
def test_classifier_is_the_log_softmax_of_the_models_logits(tmp_path, label):
    folder, model = classifier_folder(tmp_path)
    number = {"tiger cat": 1, "Tabby": 0}.get(label, 4)
    reward, without = (load_reward("image-classifier", model=folder, label=label, absent=a) for a in (False, True))
    images = waves(70, 50)
    scores = reward(images, PROMPTS)
    log_probabilities = model(reward.preprocess(images)).logits.log_softmax(1).detach()
    torch.testing.assert_close(scores, log_probabilities[:, number], atol=1e-5, rtol=0)
    torch.testing.assert_close(without(images, PROMPTS).exp(), 1 - scores.exp(), atol=1e-6, rtol=0)


def test_classifier_scores_a_photograph_as_its_own_processor_would_have_it(tmp_path):
    folder, model = classifier_folder(tmp_path)
    reward = load_reward("image-classifier", model=folder, label=1)
    for shape in SHAPES:
        picture = photograph(*shape)
        pixels = ViTImageProcessorPil(size={"height": 32, "width": 32})(picture, return_tensors="pt")
        expected = model(**pixels).logits.log_softmax(1)[0, 1].item()
        assert reward(from_pil([picture]), [""]).item() == pytest.approx(expected, rel=0.01)


def test_multi_label_classifier_takes_each_label_by_itself(tmp_path):
    folder, model = classifier_folder(tmp_path, problem_type="multi_label_classification")
    images = waves(32, 32)
    for absent, sign in ((False, 1), (True, -1)):
        reward = load_reward("image-classifier", model=folder, label=2, absent=absent)
        expected = torch.nn.functional.logsigmoid(sign * model(reward.preprocess(images)).logits[:, 2])
        torch.testing.assert_close(reward(images, PROMPTS), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("absent", [False, True])
def test_gradient_of_the_classifier_agrees_with_finite_differences(tmp_path, absent):
    reward = load_reward("image-classifier", model=classifier_folder(tmp_path)[0], label=1, absent=absent).double()
    gradient, difference = directional_derivatives(reward, PROMPTS)
    assert abs(gradient) > 1e-3
    assert gradient == pytest.approx(difference, rel=1e-6)


def test_labels_that_are_none():
    for label, message in {
        "tabbi": r"label='tabbi' is no label of the model; did you mean 'tabby'\?",
        "submarine": r"label='submarine' is no label.* a number from 0 to 4 or a name: 0: 'tabby, tabby cat', 1:",
        7: "label=7 is no label",
        "crane": "label='crane' is the name of 2, 3; give one of the numbers",
    }.items():
        with pytest.raises(ValueError, match=message):
            find_label(label, LABELS)


# Detectors: tiny ones of each family


def owl_tokenizer(folder):
    """Of words, framed as CLIP's: the last token is the end, where the text encoder reads its result."""
    words = ["!", "a", "cat", "two", "red", "cars", "photo", "of", "<unk>", "<start>", "<end>"]
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 9), ("<end>", 10)]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="!", unk_token="<unk>", bos_token="<start>", eos_token="<end>"
    ).save_pretrained(folder)


def owl_folder(folder, family):
    prefix = {"owlvit": "OwlViT", "owlv2": "Owlv2"}[family]
    text = {"vocab_size": 11, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    vision = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "image_size": 64, "patch_size": 16}
    heads = {"num_attention_heads": 2}
    config = getattr(transformers, f"{prefix}Config")(
        text_config=text | heads | {"pad_token_id": 0, "bos_token_id": 9, "eos_token_id": 10},
        vision_config=vision | heads, projection_dim=32,
    )  # fmt: skip
    model = randomise(getattr(transformers, f"{prefix}ForObjectDetection")(config))
    model.save_pretrained(folder)
    processor = {"owlvit": OwlViTImageProcessorPil, "owlv2": Owlv2ImageProcessorPil}[family]
    processor(size={"height": 64, "width": 64}, do_center_crop=False).save_pretrained(folder)
    owl_tokenizer(folder)
    return model


def bert_tokenizer(folder):
    """Of words, with the numbers of BERT's special tokens, which Grounding DINO knows by heart."""
    words = [f"word{number}" for number in range(1040)]
    words[0], words[100], words[101], words[102], words[1012] = "[PAD]", "[UNK]", "[CLS]", "[SEP]", "."
    words[5:10] = ["a", "cat", "two", "red", "cars"]
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 101), ("[SEP]", 102)]
    )
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)


def grounding_dino_folder(folder, **settings):
    config = transformers.GroundingDinoConfig(
        backbone_config=transformers.SwinConfig(
            embed_dim=8, depths=[1, 1, 1], num_heads=[1, 2, 2], window_size=4, patch_size=4,
            out_features=["stage2", "stage3"],
        ),
        text_config={
            "model_type": "bert", "vocab_size": 1040, "hidden_size": 32, "intermediate_size": 32,
            "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 32,
        },
        d_model=32, encoder_layers=1, decoder_layers=2, encoder_ffn_dim=32, decoder_ffn_dim=32,
        encoder_attention_heads=2, decoder_attention_heads=2, num_queries=20, num_feature_levels=3, max_text_len=24,
    )  # fmt: skip
    for name, value in settings.items():
        setattr(config, name, value)
    model = randomise(transformers.GroundingDinoForObjectDetection(config))
    model.save_pretrained(folder)
    GroundingDinoImageProcessorPil(size={"shortest_edge": 64, "longest_edge": 100}).save_pretrained(folder)
    bert_tokenizer(folder)
    return model


FAMILIES = {
    "owlvit": lambda folder: owl_folder(folder, "owlvit"),
    "owlv2": lambda folder: owl_folder(folder, "owlv2"),
    "grounding-dino": grounding_dino_folder,
}


@pytest.fixture(scope="module")
def detectors(tmp_path_factory):
    """Folder and model by family."""
    made = {}
    for family, make in FAMILIES.items():
        folder = tmp_path_factory.mktemp(family)
        made[family] = (str(folder), make(folder))
    return made


def published(family, folder, model, pictures, texts):
    """Scores and boxes of the family's own processor and forward, as its documentation uses them."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    pixels = processor(pictures, return_tensors="pt")["pixel_values"].float()
    if family == "grounding-dino":
        tokens = tokenizer([f"{text}." for text in texts], padding=True, return_tensors="pt")
        output = model(pixel_values=pixels, **tokens)
        return output.logits.max(-1).values, output.pred_boxes
    tokens = tokenizer(texts, padding="max_length", max_length=16, return_tensors="pt")
    output = model(pixel_values=pixels, input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
    return output.logits[..., 0], output.pred_boxes


@pytest.mark.parametrize("family", FAMILIES)
def test_detector_finds_what_the_published_model_finds(family, detectors):
    folder, model = detectors[family]
    detector = objects.load_detector(folder, None)
    pictures = [photograph(80, 100), photograph(80, 100).transpose(1)]
    logits, boxes = published(family, folder, model, pictures, PROMPTS)
    detector.preprocess = lambda images: transformers.AutoImageProcessor.from_pretrained(folder)(
        pictures, return_tensors="pt"
    )["pixel_values"].float()
    found = detector(from_pil(pictures), PROMPTS)
    torch.testing.assert_close(found.logits, logits, atol=1e-5, rtol=1e-5)
    centre, sides = boxes.split(2, -1)
    torch.testing.assert_close(
        found.corners, torch.cat([centre - sides / 2, centre + sides / 2], -1), atol=2e-5, rtol=0
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_objects_score_a_photograph_as_the_models_own_processor_would_have_it(family, detectors):
    folder, model = detectors[family]
    # Which places of the picture become boxes is a discrete choice of Grounding DINO, which with random weights
    # the last digit of a pixel decides: it gets pictures that need no resizing, hence no rounding.
    pictures = [
        photograph(*shape) for shape in ([(64, 64), (64, 100), (100, 64)] if family == "grounding-dino" else SHAPES)
    ]
    published_boxes = [published(family, folder, model, [picture], ["a cat"]) for picture in pictures]
    for settings in ({}, {"count": 2}, {"absent": True}):
        reward = load_reward("objects", model=folder, contains="a cat", threshold=0.5, **settings)
        for picture, (logits, boxes) in zip(pictures, published_boxes, strict=True):
            expected = by_definition(logits[0], boxes[0], 0.5, 0 if settings.get("absent") else settings.get("count"))
            assert reward(from_pil([picture]), [""]).item() == pytest.approx(expected, rel=0.01, abs=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_score_does_not_depend_on_the_rest_of_the_batch(family, detectors):
    reward = load_reward("objects", model=detectors[family][0], threshold=0.5, absent=True)
    images = waves(64, 80)
    together = reward(images, PROMPTS)
    check_scores(together, images, "objects", PROMPTS)
    alone = torch.cat([reward(images[i : i + 1], PROMPTS[i : i + 1]) for i in (1, 0)]).flip(0)
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-5)
    swapped = reward(images, PROMPTS[::-1])
    assert (swapped - together).abs().min() > 1e-3


@pytest.mark.parametrize("settings", [{"threshold": 0.97}, {"absent": True}, {"count": 2}])
@pytest.mark.parametrize("family", ["owlvit", "owlv2"])
def test_gradient_of_objects_agrees_with_finite_differences(family, settings, detectors):
    reward = load_reward("objects", model=detectors[family][0], **{"threshold": 0.5, **settings}).double()
    gradient, difference = directional_derivatives(reward, PROMPTS, step=1e-7)
    assert abs(gradient) > 1e-3
    assert gradient == pytest.approx(difference, rel=1e-4)


def test_gradient_of_grounding_dino_agrees_with_finite_differences_but_for_the_models_own_cuts(detectors, monkeypatch):
    reward = load_reward("objects", model=detectors["grounding-dino"][0], threshold=0.5, absent=True).double()
    monkeypatch.setattr(torch.Tensor, "detach", lambda tensor: tensor)
    torch.set_default_dtype(torch.float64)  # which the model's logits have, whatever the rest of it has
    try:
        gradient, difference = directional_derivatives(reward, PROMPTS, step=1e-7)
    finally:
        torch.set_default_dtype(torch.float32)
    assert abs(gradient) > 1e-3
    assert gradient == pytest.approx(difference, rel=1e-4)


# Objects: the formulas


def by_definition(logits, boxes, threshold, count):
    """The reward of one picture, with loops: greedy suppression, then a sum over which boxes are objects."""
    order = logits.argsort(descending=True)[:100].tolist()
    edges = [[cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2] for cx, cy, w, h in boxes.tolist()]

    def overlap(one, other):
        width = min(one[2], other[2]) - max(one[0], other[0])
        height = min(one[3], other[3]) - max(one[1], other[1])
        both = max(width, 0) * max(height, 0)
        return both / ((one[2] - one[0]) * (one[3] - one[1]) + (other[2] - other[0]) * (other[3] - other[1]) - both)

    kept, probabilities = [], []
    for i in order:
        z = 4 * (logits[i].item() - math.log(threshold / (1 - threshold)))
        if all(overlap(edges[i], edges[j]) <= 0.5 for j in kept):
            kept.append(i)
        else:
            z -= 20
        probabilities.append(1 / (1 + math.exp(-z)))
    distribution = np.array([1.0])
    for p in probabilities:
        distribution = np.convolve(distribution, [1 - p, p])
    return math.log(distribution[1:].sum() if count is None else distribution[count])


@pytest.mark.parametrize("count", [None, 0, 1, 2, 5])
def test_log_probabilities_are_sums_over_all_subsets(count):
    z = 3 * torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = torch.zeros(4, dtype=torch.float64)
    for subset in itertools.product([False, True], repeat=5):
        if (sum(subset) >= 1) if count is None else (sum(subset) == count):
            expected += torch.where(torch.tensor(subset), z.sigmoid(), 1 - z.sigmoid()).prod(1)
    ours = objects.log_some(z) if count is None else objects.log_exactly(z, count)
    torch.testing.assert_close(ours.exp(), expected, atol=1e-12, rtol=1e-9)


def test_improbable_numbers_have_finite_scores_and_gradients():
    z = torch.full((1, 60), -90.0, requires_grad=True)
    for score, expected in (
        (objects.log_some(z), math.log(60) - 90),
        (objects.log_exactly(z, 2), math.log(60 * 59 / 2) - 180),
    ):
        assert score.item() == pytest.approx(expected, rel=1e-5)
        (gradient,) = torch.autograd.grad(score.sum(), z)
        assert gradient.isfinite().all() and (gradient > 0).all()


def scene(objects_at, score=0.6, background=0.01):
    """Boxes of a detector: objects of three boxes each, one better than the others, and 3000 of background."""
    generator = torch.Generator().manual_seed(0)
    places = torch.rand(3000, 2, generator=generator)
    sides = 0.03 + 0.2 * torch.rand(3000, 2, generator=generator)
    corners, probabilities = [torch.cat([places, places + sides], 1)], [background * torch.rand(3000)]
    for x, y in objects_at:
        for shift, factor in ((0.0, 1.0), (0.01, 0.8), (-0.01, 0.7)):
            corners.append(torch.tensor([[x + shift, y, x + shift + 0.2, y + 0.2]]))
            probabilities.append(torch.tensor([score * factor]))
    return objects.Boxes(torch.cat(probabilities).logit()[None], torch.cat(corners)[None])


class Found(torch.nn.Module):
    threshold = 0.1

    def __init__(self, boxes):
        super().__init__()
        self.boxes = boxes

    def forward(self, images, texts):
        return self.boxes


def probability(boxes, monkeypatch, **settings):
    monkeypatch.setattr(objects, "load_detector", lambda model, revision: Found(boxes))
    return load_reward("objects", contains="a cat", **settings)(torch.zeros(1, 3, 8, 8), [""]).exp().item()


def test_objects_are_counted_once_and_background_is_not(monkeypatch):
    three = scene([(0.1, 0.1), (0.5, 0.1), (0.3, 0.6)])
    assert probability(three, monkeypatch, count=3) > 0.98
    assert probability(three, monkeypatch, count=2) < 0.01
    assert probability(three, monkeypatch) > 0.999
    assert probability(three, monkeypatch, absent=True) < 1e-6
    assert probability(three, monkeypatch, absent=True) == probability(three, monkeypatch, count=0)
    empty = scene([])
    assert probability(empty, monkeypatch) < 0.02
    assert probability(empty, monkeypatch, absent=True) > 0.98


def test_suppression_keeps_the_best_of_each_cluster():
    corners = torch.tensor([[0, 0, 10, 10], [0, 0, 10, 9], [0, 0, 10, 4.8], [20, 0, 30, 10], [0, 0, 10, 5.5]])
    boxes = objects.Boxes(torch.tensor([[5.0, 4, 3, 2, 1]]), corners[None].float())
    # The third overlaps the first by 0.48, and by 0.53 only the second, which is out; the fifth the first by 0.55.
    assert objects.distinct(boxes, 0.5).tolist() == [[True, False, True, True, False]]
    assert objects.distinct(boxes, 0.95).all()


def test_gradient_raises_what_is_missing_and_lowers_what_is_too_much(monkeypatch):
    boxes = scene([(0.1, 0.1), (0.5, 0.1)], score=0.12)
    for settings, sign in (({}, 1), ({"count": 2}, 1), ({"absent": True}, -1), ({"count": 0}, -1)):
        logits = boxes.logits.clone().requires_grad_()
        monkeypatch.setattr(objects, "load_detector", lambda m, r, x=logits: Found(objects.Boxes(x, boxes.corners)))
        load_reward("objects", contains="a cat", **settings)(torch.zeros(1, 3, 8, 8), [""]).sum().backward()
        best = logits.grad[0, [3000, 3003]]  # of the two objects; their other boxes are suppressed
        assert (sign * best > 0.01).all()
        assert (logits.grad[0, [3001, 3004]].abs() < 1e-3 * best.abs()).all()


# Bad input


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"absent": True, "count": 2}, "count=2 and absent=True exclude each other; leave one"),
        ({"count": -1}, "count=-1 needs 0 <= count <= 100"),
        ({"threshold": 1.5}, "threshold=1.5 needs 0 < threshold < 1"),
        ({"contains": " "}, "contains=' ' names nothing to look for"),
        ({"model": "/nowhere/at/all"}, "model='/nowhere/at/all' does not exist; give the folder of a open-vocabulary"),
        ({"model": "nobody/nothing"}, r"model='nobody/nothing' could not be loaded .*check its name and revision, and"),
    ],
)
def test_arguments_of_objects_that_make_no_sense(arguments, message):
    with pytest.raises(ValueError, match=message) as raised:
        load_reward("objects", **{"model": "/nowhere", **arguments})
    assert "\n" not in str(raised.value)


def test_foreign_checkpoints_are_refused(tmp_path, detectors):
    folder, _ = classifier_folder(tmp_path / "classifier")
    with pytest.raises(ValueError, match="is of the type 'vit', no open-vocabulary detector"):
        load_reward("objects", model=folder)
    with pytest.raises(ValueError, match=r"is no image classifier of transformers|could not be loaded as image class"):
        load_reward("image-classifier", model=detectors["grounding-dino"][0], label=0)
    headless = tmp_path / "headless"
    transformers.ViTModel(transformers.ViTConfig.from_pretrained(folder)).save_pretrained(headless)
    ViTImageProcessorPil().save_pretrained(headless)
    with pytest.raises(ValueError, match="is no image classifier of transformers: it lacks 2 weights such as 'classif"):
        load_reward("image-classifier", model=str(headless), label=0)
    with pytest.raises(ValueError, match="needs label"):
        load_reward("image-classifier", model=folder)


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    owl_folder(tmp_path, "owlv2")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).unlink(missing_ok=True)
    bert_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="has a tokenizer of 1040 tokens, where the model knows 11; give a folder"):
        load_reward("objects", model=str(tmp_path))


class Harmful:
    def __reduce__(self):
        return (open, ("harmed", "w"))


def test_pickles_are_not_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder, _ = classifier_folder(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    for path in (tmp_path / "model" / "pytorch_model.bin", tmp_path / "weights.pt"):
        path.write_bytes(pickle.dumps({"classifier.weight": Harmful()}))
    with pytest.raises(ValueError, match="could execute"):
        load_reward("image-classifier", model=folder, label=0)
    with pytest.raises(ValueError, match="could execute anything; convert it to safetensors"):
        load_tensors(str(tmp_path / "weights.pt"), "", None, "anything")
    assert not (tmp_path / "harmed").exists()
