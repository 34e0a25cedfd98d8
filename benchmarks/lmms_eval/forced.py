"""How likely given texts are as answers, found by generating exactly them."""

from dataclasses import dataclass, field
from typing import Any, Self

import msgspec
import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from vlm_prune.benchmarks.lmms_eval.answers import StoredAnswer
from vlm_prune.vlm.chat import encode_text, special_tokens


@dataclass
class Forced(LogitsProcessor):  # type: ignore[misc]
    """Makes `generate` say given tokens, and adds up what they cost.

    So the text to score stays out of the prompt, and no method's selection can see it.

    Args:
        tokens: what each row is made to say.
    """

    tokens: list[list[int]]
    device: torch.device
    step: int = 0
    nll: list[Tensor] = field(init=False)
    greedy: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        rows = len(self.tokens)
        self.nll = list(torch.zeros(rows, dtype=torch.float64, device=self.device))
        self.greedy = list(torch.ones(rows, dtype=torch.bool, device=self.device))

    @classmethod
    def of(cls, processor: Any, prompts: list[str], texts: list[str], device: torch.device) -> Self:
        """Returns the tokens that each text adds to its rendered prompt.

        Args:
            processor: the model's.
            prompts: rendered.
            texts: what is scored behind each.
            device: of the model.
        """
        tokens = []
        for prompt, text in zip(prompts, map(special_tokens(processor).hide, texts), strict=True):
            before = encode_text(processor, prompt)
            whole = encode_text(processor, prompt + text)
            if whole[: len(before)] != before:  # prompt and text share a token
                whole = before + encode_text(processor, text)
            tokens.append(whole[len(before) :])
        return cls(tokens, device)

    def options(self) -> dict[str, Any]:
        length = max(1, *map(len, self.tokens)) if self.tokens else 1
        return {
            "max_new_tokens": length,
            "repetition_penalty": 1.0,
            "logits_processor": LogitsProcessorList([self]),
        }

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Returns scores (B, V) that allow one token each."""
        forced = torch.full_like(scores, -torch.inf)
        for row, tokens in enumerate(self.tokens):
            if self.step < len(tokens):
                token = tokens[self.step]
                likely = scores[row].double().log_softmax(-1)
                self.nll[row] = self.nll[row] - likely[token]
                self.greedy[row] = self.greedy[row] & (likely.argmax() == token)
            else:
                token = tokens[-1] if tokens else 0
            forced[row, token] = 0
        self.step += 1
        return forced

    def scored(self, row: StoredAnswer, number: int) -> StoredAnswer:
        """Returns a row with its text's cost in nats, a sum over the tokens, and whether that text is
        the greedy one.
        """
        return msgspec.structs.replace(
            row,
            nll=float(self.nll[number]),
            greedy=bool(self.greedy[number]),
            output_tokens=len(self.tokens[number]),
        )
