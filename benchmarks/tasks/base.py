"""What a task is: questions about images with one gold answer each, made from a seed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from PIL import Image

from vlm_prune.benchmarks.tasks.vqa import exact_match
from vlm_prune.vlm.common.video import VideoClip

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")


@dataclass(frozen=True)
class Turn:
    """One user turn, and the assistant's reply where it is part of the prompt.

    `images`, or a `video`, come before `text`, as LLaVA was trained.
    """

    text: str
    images: tuple[Image.Image, ...] = ()
    reply: str | None = None
    video: VideoClip | None = None


@dataclass(frozen=True)
class Sample:
    """One question: the conversation up to it, the gold answer, and the subset it belongs to."""

    turns: tuple[Turn, ...]
    answer: str
    subset: str = ""
    id: str = ""

    @property
    def images(self) -> tuple[Image.Image, ...]:
        return tuple(image for turn in self.turns for image in turn.images)

    @property
    def videos(self) -> tuple[VideoClip, ...]:
        """Returns the videos of all turns."""
        return tuple(turn.video for turn in self.turns if turn.video is not None)

    def messages(self) -> list[dict[str, Any]]:
        """Returns the conversation in the chat-template format of `transformers`."""
        messages: list[dict[str, Any]] = []
        for turn in self.turns:
            content: list[dict[str, Any]] = [{"type": "image"} for _ in turn.images]
            content += [{"type": "video"}] * (turn.video is not None)
            content.append({"type": "text", "text": turn.text})
            messages.append({"role": "user", "content": content})
            if turn.reply is not None:
                reply = [{"type": "text", "text": turn.reply}]
                messages.append({"role": "assistant", "content": reply})
        return messages


@dataclass(frozen=True)
class Question:
    """A question about a scene (or about nothing but its own text) and its gold answer."""

    text: str
    answer: str
    subset: str = ""


@dataclass(frozen=True)
class Task:
    """A named stream of samples: `index`, `seed` and `split` decide a sample completely.

    Args:
        name: as on the command line.
        visual: whether the last turn asks about an image or a video.
        make: draws one sample from a random generator; the split decides which photographs and
            handwritten digits it may use.
        score: 1.0 for a right answer, 0.0 for a wrong one, given prediction and gold answer.
        new_tokens: of an answer at most.
    """

    name: str
    visual: bool
    make: Callable[[np.random.Generator, Split], Sample]
    score: Callable[[str, str], float] = exact_match
    new_tokens: int = 16

    def sample(self, index: int, seed: int = 0, split: Split = "test") -> Sample:
        """Returns the `index`-th sample of the stream.

        Args:
            index: from 0.
            seed: of the stream.
            split: train, val or test; they share no photograph and no handwritten digit.
        """
        rng = self.generator(index, seed, split)
        return replace(self.make(rng, split), id=question_id(self.name, index))

    def generator(self, index: int, seed: int, split: Split) -> np.random.Generator:
        """Returns what draws a sample.

        Args:
            index: of the sample.
            seed: of the stream.
            split: train, val or test.
        """
        return np.random.default_rng([SPLITS.index(split), seed, index, *self.name.encode()])


def question_id(task: str, index: int) -> str:
    """Returns the name of a task's question."""
    return f"{task}/{index:06d}"


def shares(names: Sequence[str], limit: int) -> dict[str, int]:
    """Returns how many of `limit` questions each task has, as evenly as they go.

    The first names of the alphabet have one more, so that the order of the tasks changes nothing.
    """
    each, rest = divmod(limit, len(names))
    first = set(sorted(names)[:rest])
    return {name: each + (name in first) for name in names}
