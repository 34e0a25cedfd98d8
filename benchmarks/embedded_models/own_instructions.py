"""Conversations that a language model writes itself, as Magpie does, https://arxiv.org/abs/2406.08464.

Given its chat template up to the user's turn, an instruction-tuned model goes on with an instruction;
its own answer to it is what a further training is to keep.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from vlm_prune.benchmarks.tasks.vqa import normalize


@torch.no_grad()
def write_instructions(
    model: Any, tokenizer: Any, opening: str, number: int, seed: int, new_tokens: int = 40
) -> list[str]:
    """Samples instructions at temperature 1, and returns those that ended by themselves.

    Args:
        model: a language model, or a LLaVA over it.
        tokenizer: the model's.
        opening: its chat template up to the user's words.
        number: of samples.
        seed: of torch.
        new_tokens: of an instruction at most.
    """
    torch.manual_seed(seed)
    inputs = tokenizer([opening] * number, return_tensors="pt")
    out = model.generate(
        **inputs, max_new_tokens=new_tokens, do_sample=True, temperature=1.0, top_k=0, top_p=1.0
    )
    new = out[:, inputs.input_ids.shape[1] :]
    ended = [ids for ids in new if tokenizer.eos_token_id in ids.tolist()]
    texts = [text.strip() for text in tokenizer.batch_decode(ended, skip_special_tokens=True)]
    return [text for text in texts if text]


@torch.no_grad()
def answer(
    model: Any, tokenizer: Any, prompts: Sequence[str], new_tokens: int = 64
) -> list[tuple[Tensor, int]]:
    """Returns each prompt with its greedy answer as token ids, and the index where the answer starts.

    Args:
        model: a language model, or a LLaVA over it.
        tokenizer: the model's; pads on the left.
        prompts: as its chat template writes them.
        new_tokens: of an answer at most.
    """
    inputs = tokenizer(list(prompts), return_tensors="pt", padding=True)
    length = inputs.input_ids.shape[1]
    out = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
    answers = []
    for ids, mask in zip(out, inputs.attention_mask, strict=True):
        ends = (ids[length:] == tokenizer.eos_token_id).nonzero()[:, 0]
        stop = length + int(ends[0]) + 1 if len(ends) else len(ids)
        start = length - int(mask.sum())
        answers.append((ids[start:stop], length - start))
    return answers


def without(texts: Sequence[str], excluded: Iterable[str]) -> list[str]:
    """Returns the texts that equal none of the excluded ones, normalized as VQA does, each once."""
    seen = {normalize(text) for text in excluded}
    left = []
    for text in texts:
        key = normalize(text)
        if key not in seen:
            left.append(text)
        seen.add(key)
    return left
