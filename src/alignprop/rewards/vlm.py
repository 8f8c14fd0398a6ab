"""Reward of a vision-language model that is asked a question: the log-probability of "yes".

The score is that of VQAScore (Lin et al. 2024, arXiv 2404.01291, equation 1), in logarithms. The family is LLaVA:
what it does to a picture (resize, crop, normalise) has a gradient, and the result has one size for every picture.
SmolVLM and Idefics3 cut a picture into tiles, Qwen2-VL into as many patches as it has room for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from alignprop.rewards.checkpoints import explained, load_model, load_part
from alignprop.rewards.preprocessing import Preprocessing, compared

KIND = "LLaVA of transformers (LlavaForConditionalGeneration)"
QUESTION = "Does this picture show {prompt}? Answer yes or no."
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class VlmQuestion(nn.Module):
    """Log-probability, at most 0, that the model's answer begins with "yes"."""

    def __init__(
        self,
        model: str,
        question: str = QUESTION,
        answer: str = "yes",
        dtype: str = "float32",
        revision: str | None = None,
    ) -> None:
        """Load a model.

        Args:
            model: Folder or hub id of a LLaVA of transformers, such as LLaVA 1.5 or LLaVA-Interleave.
            question: Put to the model after the picture; `{prompt}` stands for the picture's prompt.
            answer: One word. Its probability is summed over how it can be written at the start of an answer: with
                a capital or not, after a space or not.
            dtype: Of the weights: float32, bfloat16 or float16. The score is float32 at least.
            revision: Commit, tag or branch on the hub; pin it for runs to be repeatable.

        Raises:
            ValueError: There is no such model, or the answer is no word to it.
        """
        import transformers

        super().__init__()
        if dtype not in DTYPES:
            raise ValueError(f"dtype={dtype!r} is not known; give one of {', '.join(DTYPES)}.")
        config = load_part(transformers.AutoConfig, model, revision, KIND)
        if config.model_type != "llava":
            raise ValueError(f"model={model!r} is of the type {config.model_type!r}, no {KIND}; give one of these.")
        self.processor = load_part(transformers.AutoProcessor, model, revision, KIND)
        self.answers = spellings(self.processor.tokenizer, answer)
        with explained(model, KIND):  # a template may lack, or be no template
            self.prefix, self.suffix = conversation(self.processor)
        pictures = load_part(transformers.AutoImageProcessor, model, revision, KIND, backend="pil")
        self.preprocess = Preprocessing.of(pictures, model)
        self.model = load_model(transformers.LlavaForConditionalGeneration, model, revision, KIND).to(DTYPES[dtype])
        self.question = question
        self._tokens: dict[tuple[str, int, int], Tensor] = {}

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score each image."""
        height, width = images.shape[-2:]
        rows = [self._encode(self.question.replace("{prompt}", prompt), height, width) for prompt in prompts]
        lengths = torch.tensor([len(row) for row in rows])
        # Padded behind the question: what comes later is not seen, so that no score depends on its company.
        tokens = pad_sequence(rows, batch_first=True, padding_value=self._padding()).to(images.device)
        seen = (torch.arange(tokens.shape[1]) < lengths[:, None]).to(images.device)
        pixels = self.preprocess(images).to(self.model.dtype)
        hidden = self.model.model(input_ids=tokens, attention_mask=seen.long(), pixel_values=pixels).last_hidden_state
        last = hidden[torch.arange(len(rows), device=hidden.device), (lengths - 1).to(hidden.device)]
        logits = self.model.lm_head(last)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        scores: Tensor = logits[:, self.answers].logsumexp(1) - logits.logsumexp(1)
        return scores

    def reference_pixels(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """What the model is given, and what its own image processor gives it."""
        return compared(self.preprocess, images)

    def _encode(self, question: str, height: int, width: int) -> Tensor:
        """Tokens of the conversation about a picture of a size, with the places that the picture takes."""
        key = (question, height, width)
        if key not in self._tokens:
            from PIL import Image

            text = self.prefix + question + self.suffix
            blank = Image.new("RGB", (width, height))  # only its size is looked at
            self._tokens[key] = self.processor(images=[blank], text=[text], return_tensors="pt")["input_ids"][0]
        return self._tokens[key]

    def _padding(self) -> int:
        padding = self.processor.tokenizer.pad_token_id
        return 0 if padding is None else int(padding)


def spellings(tokenizer: Any, answer: str) -> list[int]:
    """Tokens that are the whole answer, in lower case or with a capital, after a space or not.

    Raises:
        ValueError: There is none.
    """
    words = [space + word for word in (answer.lower(), answer.capitalize()) for space in ("", " ")]
    encoded = [tokenizer.encode(word, add_special_tokens=False) for word in words]
    found = sorted({tokens[0] for tokens in encoded if len(tokens) == 1} - {tokenizer.unk_token_id})
    if not found:
        raise ValueError(f"answer={answer!r} is not one token of the model; give one short word, such as 'yes'.")
    return found


def conversation(processor: Any) -> tuple[str, str]:
    """What the model's chat template writes before and after a question about a picture."""
    mark = "QUESTION"
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": mark}]}
    before, after = processor.apply_chat_template([message], add_generation_prompt=True).split(mark)
    return before, after
