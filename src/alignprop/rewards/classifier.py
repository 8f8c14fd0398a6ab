"""Reward of an image classifier: the log-probability of a label, or of its absence."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alignprop.rewards.checkpoints import load_model, load_part
from alignprop.rewards.preprocessing import Preprocessing, compared

KIND = "image classifier of transformers"


class ImageClassifier(nn.Module):
    """Log-probability that a classifier gives a label, at most 0, whatever the prompt.

    With logits `z` and label `k` it is `z_k - logsumexp(z)`, and of the absence the logarithm of one minus that
    probability; a multi-label classifier has a probability for each label by itself, `sigmoid(z_k)`.
    """

    def __init__(self, model: str, label: str | int, absent: bool = False, revision: str | None = None) -> None:
        """Load a classifier.

        Args:
            model: Folder or hub id of any image classification model of transformers.
            label: A name of the model's `id2label`, one of its synonyms ("tabby" of "tabby, tabby cat") or its
                number.
            absent: Reward pictures that do not show the label.
            revision: Commit, tag or branch on the hub; pin it for runs to be repeatable.

        Raises:
            ValueError: There is no such classifier or label, or its pictures cannot be prepared with gradient.
        """
        from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification

        super().__init__()
        config = load_part(AutoConfig, model, revision, KIND)
        self.label = find_label(label, config.id2label)
        processor = load_part(AutoImageProcessor, model, revision, KIND, backend="pil")
        self.preprocess = Preprocessing.of(processor, model)
        self.model = load_model(AutoModelForImageClassification, model, revision, KIND)
        self.multi_label = config.problem_type == "multi_label_classification" or config.num_labels == 1
        self.absent = absent

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score each image."""
        logits = self.model(pixel_values=self.preprocess(images)).logits
        if self.multi_label:
            log_odds = logits[:, self.label]
            return F.logsigmoid(-log_odds if self.absent else log_odds)
        return log_probability(logits, [n for n in range(logits.shape[1]) if (n == self.label) != self.absent])

    def reference_pixels(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """What the model is given, and what its own image processor gives it."""
        return compared(self.preprocess, images)


def log_probability(logits: Tensor, labels: Sequence[int]) -> Tensor:
    """Log-probability of any of some labels, by logits (B, labels) of a softmax: shape (B,), at most 0."""
    chosen = torch.zeros(logits.shape[1], dtype=torch.bool, device=logits.device)
    chosen[list(labels)] = True
    # The logarithm of a probability near 1 keeps its digits this way, where log(1 - p) would lose them.
    return F.logsigmoid(logits[:, chosen].logsumexp(1) - logits[:, ~chosen].logsumexp(1))


def find_label(label: str | int, names: Mapping[int, str]) -> int:
    """Number of a label.

    Args:
        label: Its number, its name, or one of the synonyms that make up its name, separated by commas.
        names: By number.

    Raises:
        ValueError: There is none, or the synonym belongs to several.
    """
    numbers = {str(number): int(number) for number in names}
    if str(label) in numbers:
        return numbers[str(label)]
    wanted = str(label).strip().lower()
    synonyms = {int(number): [name.lower(), *map(str.strip, name.lower().split(","))] for number, name in names.items()}
    found = [number for number, name in names.items() if name.lower() == wanted] or [
        number for number, words in synonyms.items() if wanted in words
    ]
    if len(found) == 1:
        return int(found[0])
    if found:
        raise ValueError(f"label={label!r} is the name of {', '.join(map(str, found))}; give one of the numbers.")
    near = difflib.get_close_matches(wanted, [word for words in synonyms.values() for word in words], n=1)
    few = ", ".join(f"{number}: {name!r}" for number, name in list(names.items())[:3])
    remedy = f"did you mean {near[0]!r}?" if near else f"give a number from 0 to {len(names) - 1} or a name: {few}, ..."
    raise ValueError(f"label={label!r} is no label of the model; {remedy}")
