"""Whether a language model kept its text skills: loss on plain text, and answers to instructions."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from vlm_prune.benchmarks.embedded_models.base_text import (
    PACKAGES,
    instructions,
    package_text,
)
from vlm_prune.benchmarks.tasks.vqa import normalize
from vlm_prune.kernels.dispatch import multiplies_bf16
from vlm_prune.vlm.common.files import check_output, write_json
from vlm_prune.vlm.load import load
from vlm_prune.vlm.smol.base import load_base

SAME = 0.5


@torch.no_grad()
def text_loss(
    model: Any, tokenizer: Any, texts: Sequence[str], window: int = 512, most: int | None = None
) -> Tensor:
    """Returns the cross-entropy in nats of each token of texts but the first of each window, (T,).

    Products are in bfloat16 on a CPU that has units for it, and in fp32 elsewhere.

    Args:
        model: a language model, or a LLaVA.
        tokenizer: the model's.
        texts: plain text.
        window: tokens that are read together.
        most: tokens of each text that are read; None for all.
    """
    losses, bf16 = [], multiplies_bf16(model.device)
    for text in texts:
        ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
        for part in ids[:most].split(window):
            if len(part) < 2:
                continue
            with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
                logits = model(input_ids=part[None].to(model.device), use_cache=False).logits[0]
            losses.append(cross_entropy(logits[:-1].float(), part[1:], reduction="none").cpu())
    return torch.cat(losses)


@torch.no_grad()
def greedy_answers(
    model: Any, tokenizer: Any, prompts: Sequence[str], new_tokens: int = 48, batch: int = 20
) -> list[str]:
    """Returns the greedy answer to each prompt, of `new_tokens` tokens at most.

    Args:
        model: a language model, or a LLaVA.
        tokenizer: the model's; pads on the left.
        prompts: as its chat template writes them.
        new_tokens: of an answer.
        batch: prompts answered together.
    """
    answers: list[str] = []
    for start in range(0, len(prompts), batch):
        inputs = tokenizer(list(prompts[start : start + batch]), return_tensors="pt", padding=True)
        inputs = inputs.to(model.device)
        out = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
        new = out[:, inputs.input_ids.shape[1] :]
        answers += tokenizer.batch_decode(new, skip_special_tokens=True)
    return answers


def shared_words(first: str, second: str) -> float:
    """Returns the F1 of the words that two answers share, normalized as VQA does, with repetition."""
    a, b = (Counter(normalize(text).split()) for text in (first, second))
    common = (a & b).total()
    return 2 * common / (a.total() + b.total()) if common else float(not a and not b)


def same_meaning(first: str, second: str) -> bool:
    """Returns whether two answers count as the same in meaning: at least
    half of their words are shared.

    What is compared ends with the shorter one's number of words, so that an answer that only goes
    on longer is not another one.
    """
    a, b = (normalize(text).split() for text in (first, second))
    length = min(len(a), len(b))
    return shared_words(" ".join(a[:length]), " ".join(b[:length])) >= SAME


@dataclass(frozen=True)
class TextSkills:
    """What a language model does with held-out text: the loss of each token, and its answers."""

    losses: Tensor
    answers: list[str]


def text_skills(model: Any, processor: Any) -> TextSkills:
    """Returns a model's losses on held-out package texts and its answers to held-out instructions.

    Args:
        model: SmolLM2, or a LLaVA over it.
        processor: of the LLaVA, for both.
    """
    losses = text_loss(model, processor.tokenizer, package_text("held out"))
    return TextSkills(losses, greedy_answers(model, processor.tokenizer, chat_prompts(processor)))


def chat_prompts(processor: Any) -> list[str]:
    """Returns the held-out instructions as the chat template writes them."""
    return [
        processor.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True
        )
        for text in instructions("held out")
    ]


def agreement(first: Sequence[str], second: Sequence[str]) -> dict[str, float]:
    """Returns in per cent how many of two models' answers are identical, and have the same meaning."""
    pairs = list(zip(first, second, strict=True))
    return {
        "identical_percent": 100 * fmean(a == b for a, b in pairs),
        "same_meaning_percent": 100 * fmean(same_meaning(a, b) for a, b in pairs),
    }


def rounding_floor(model: Any, processor: Any, answers: Sequence[str]) -> dict[str, Any]:
    """Returns how SmolLM2's answers agree with its own in other batches, and in bfloat16 on a CPU
    that has units for it: what the rule says of a model whose weights have not changed.

    Args:
        model: SmolLM2, which is bfloat16 afterward.
        processor: of the LLaVA.
        answers: of the model, in batches of the usual size.
    """
    prompts, tokenizer = chat_prompts(processor), processor.tokenizer
    floor = {"batches of 7": agreement(answers, greedy_answers(model, tokenizer, prompts, batch=7))}
    if multiplies_bf16(model.device):
        rounded = greedy_answers(model.to(torch.bfloat16), tokenizer, prompts)
        floor["bfloat16"] = agreement(answers, rounded)
    return floor


def compared(base: TextSkills, tuned: TextSkills, floor: dict[str, Any]) -> dict[str, Any]:
    """Returns how a tuned model's text skills differ from its base's, with all answers.

    Args:
        base: of SmolLM2.
        tuned: of the LLaVA over it.
        floor: of `rounding_floor`.
    """
    before, after = base.losses.mean().item(), tuned.losses.mean().item()
    pairs = list(zip(base.answers, tuned.answers, strict=True))
    same = [same_meaning(a, b) for a, b in pairs]
    rows = [
        {"instruction": text, "base": a, "smol": b, "same": alike}
        for text, (a, b), alike in zip(instructions("held out"), pairs, same, strict=True)
    ]
    return {
        "tokens": len(base.losses),
        "loss": {"base": before, "smol": after},
        "loss_increase_percent": 100 * (after / before - 1),
        "instructions": len(rows),
        **agreement(base.answers, tuned.answers),
        "smollm2_against_itself": floor,
        "packages": {name: version(name) for name in PACKAGES["held out"]},
        "answers": rows,
    }


def measure(output: Path) -> None:
    """Writes how the text skills of the embedded LLaVA over SmolLM2 differ from SmolLM2's own.

    Args:
        output: JSON file for the figures and for all answers.

    Raises:
        InputError: if the output cannot be written, or SmolLM2's weights are not installed.
    """
    check_output(output)
    tuned, processor = load("smol", "cpu")
    language = load_base()[0].eval()
    base = text_skills(language, processor)
    floor = rounding_floor(language, processor, base.answers)
    write_json(output, compared(base, text_skills(tuned, processor), floor))
