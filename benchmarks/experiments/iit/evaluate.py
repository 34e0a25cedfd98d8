"""Answer the last turn of each conversation, after gold replies or the model's own."""

import json
import re
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from vlm_prune.benchmarks.evaluation.environment import command_line, versions
from vlm_prune.benchmarks.experiments.iit.build import LABEL, Conversation
from vlm_prune.benchmarks.experiments.iit.sources import LETTERS
from vlm_prune.benchmarks.stats.bootstrap import mean_interval
from vlm_prune.benchmarks.tasks.base import Sample, Turn
from vlm_prune.benchmarks.tasks.iit import SETTINGS
from vlm_prune.vlm.chat import encode_prompts, render
from vlm_prune.vlm.common.errors import InputError, naming
from vlm_prune.vlm.common.files import check_outputs, read_bytes, write_json, write_text
from vlm_prune.vlm.common.images import open_image
from vlm_prune.vlm.common.paths import DataRoot
from vlm_prune.vlm.common.records import from_json

EarlierReplies = Literal["own", "gold"]
ADVICE = "build it with 'vlm-prune iit build'"
INSTRUCTION = "Answer with the option's letter from the given choices directly."


def read_conversations(folder: Path | DataRoot) -> list[Sample]:
    """Reads the conversations that `build_conversations` wrote, all replies gold.

    Raises:
        InputError: if there are none, or one is in another format or names an image that cannot be
            used.
    """
    root = DataRoot.of(folder)
    path, samples = root.folder / "iit.jsonl", list[Sample]()
    for number, line in enumerate(read_bytes(path).splitlines(), 1):
        if line.strip():
            name = f"line {number} of {path}"
            samples.append(_sample(from_json(line, Conversation, name, ADVICE), root, name))
    ids = Counter(sample.id for sample in samples)
    if repeated := [each for each, count in ids.items() if count > 1]:
        raise InputError(f"{path} holds {repeated[0]!r} more than once; {ADVICE}")
    if not samples:
        raise InputError(f"{path} holds no conversations; {ADVICE}")
    return samples


def _sample(talk: Conversation, root: DataRoot, name: str) -> Sample:
    """Returns a conversation with its images as a sample; the last reply is the answer.

    Args:
        talk: as it is stored.
        root: of the images.
        name: for messages.
    """
    turns = []
    for turn in talk.turns:
        options = "\n".join(
            f"{letter}. {option}" for letter, option in zip(LETTERS, turn.options, strict=False)
        )
        with naming(f"an image of {name} cannot be used"):
            images = (open_image(root.path(turn.image)),) if turn.image else ()
        turns.append(Turn(f"{turn.question}\n{options}\n{INSTRUCTION}", images, turn.answer))
    last = turns[-1]
    return Sample((*turns[:-1], replace(last, reply=None)), str(last.reply), talk.setting, talk.id)


def letter_of(reply: str) -> str:
    """Returns the option a reply chooses: its first capital letter that
    stands alone; empty without one.
    """
    found = re.search(rf"(?<![A-Za-z])([{LETTERS}])(?![A-Za-z])", reply)
    return found.group(1) if found else ""


@torch.inference_mode()
def _reply(model: Any, processor: Any, sample: Sample, pruner: Any | None) -> str:
    """Returns the greedy answer to the last turn of a conversation.

    Args:
        model: that answers.
        processor: the model's.
        sample: the conversation.
        pruner: a method, or None.
    """
    prompt = render(processor, sample.messages(), add_generation_prompt=True)
    inputs = encode_prompts(model, processor, [prompt], [sample.images])
    with nullcontext() if pruner is None else pruner(model):
        output = model.generate(**inputs, do_sample=False, max_new_tokens=16)
    answer = output[0, inputs["input_ids"].shape[1] :]
    return str(processor.decode(answer, skip_special_tokens=True)).strip()


def check_conversations(folder: Path | DataRoot, output: Path, context: str) -> None:
    """Finds out, before a model is loaded, whether conversations and output can be used.

    Args:
        folder: what `build` wrote.
        output: folder for the results.
        context: `own` or `gold`.

    Raises:
        InputError: if they cannot, or the context is another.
    """
    if context not in ("own", "gold"):
        raise InputError(f"context {context!r} is unknown; give own or gold")
    check_outputs(output, (f"iit-{context}.json", f"iit-{context}.jsonl"))
    read_conversations(folder)


def evaluate_conversations(
    model: Any,
    processor: Any,
    folder: Path | DataRoot,
    output: Path,
    context: EarlierReplies = "own",
    pruner: Any | None = None,
    limit: int | None = None,
) -> dict[str, Any]:
    """Returns the accuracy of the last turn by setting, with 95 % bootstrap intervals.

    Args:
        model: with or without learners.
        processor: its processor.
        folder: what `build_conversations` wrote.
        output: folder for `iit-<context>.json` and `iit-<context>.jsonl`.
        context: whether earlier turns have the model's own replies or the gold ones.
        pruner: prunes every turn; None prunes nothing.
        limit: conversations of each setting, the first ones.

    Raises:
        InputError: for an unknown context, or a folder without conversations.
    """
    check_conversations(folder, output, context)
    rows: list[dict[str, Any]] = []
    for sample in read_conversations(folder):
        seen = sum(row["setting"] == sample.subset for row in rows)
        if limit is not None and seen >= limit:
            continue
        turns = sample.turns
        if context == "own":
            for position in range(len(turns) - 1):
                unanswered = (*turns[:position], replace(turns[position], reply=None))
                reply = _reply(model, processor, replace(sample, turns=unanswered), pruner)
                answered = replace(turns[position], reply=reply)
                turns = (*turns[:position], answered, *turns[position + 1 :])
        reply = _reply(model, processor, replace(sample, turns=turns), pruner)
        rows.append(
            {
                "id": sample.id,
                "setting": sample.subset,
                "replies": [turn.reply for turn in turns[:-1]],
                "prediction": reply,
                "answer": sample.answer,
                "score": float(letter_of(reply) == sample.answer),
            }
        )
    settings = {}
    for setting in SETTINGS:
        scores = np.array([row["score"] for row in rows if row["setting"] == setting], float)
        if len(scores):
            settings[setting] = {
                "n": len(scores), "accuracy": scores.mean(), "ci": mean_interval(scores)
            }  # fmt: skip
    results = {
        "label": LABEL,
        "context": context,
        "settings": settings,
        "mean": float(np.mean([entry["accuracy"] for entry in settings.values()])),
        "versions": versions(),
        "command": command_line(),
    }
    output.mkdir(parents=True, exist_ok=True)
    write_text(output / f"iit-{context}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    write_json(output / f"iit-{context}.json", results)
    return results
