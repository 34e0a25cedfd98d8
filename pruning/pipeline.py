"""`PrunedVLM`: model, processor and pruner in one object."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from vlm_prune.pruning.base import Pruner
from vlm_prune.pruning.registry import build
from vlm_prune.vlm.chat import encode_prompts, render, video_frames_of
from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.common.images import ImageSource
from vlm_prune.vlm.common.video import VideoClip, open_visual
from vlm_prune.vlm.compiled import compiled_prefill
from vlm_prune.vlm.families import family_of
from vlm_prune.vlm.load import load


class PrunedVLM:
    """A vision-language model that answers questions with fewer image and video tokens.

    Args:
        model: an unmodified Hugging Face model of a supported family.
        processor: its processor.
        pruner: a pruner; None leaves the model as it is.
        compile: whether the language model's layers run prompts compiled; answers stay the same.
    """

    def __init__(
        self, model: Any, processor: Any, pruner: Any | None = None, compile: bool = False
    ) -> None:
        self.model, self.processor, self.compile = model, processor, compile
        self.pruner: Any = pruner
        if isinstance(pruner, Pruner):
            self.pruner = pruner.prepared(model, processor)
        self.lock = Lock()

    @classmethod
    def from_pretrained(
        cls,
        name: str = "tiny",
        pruner: str = "none",
        budget: float = 64,
        device: str = "auto",
        dtype: str = "auto",
        device_map: str | dict[str, Any] | None = None,
        quantization: str | None = None,
        attn: str | None = None,
        adapter: str | None = None,
        compile: bool = False,
        **hyperparameters: Any,
    ) -> "PrunedVLM":
        """Loads a checkpoint and builds a pruner by its registered name.

        Args:
            name: `tiny`, `smol`, a folder, or a hub name.
            pruner: a method's registered name, or several joined by `+`.
            budget: image tokens kept per image, or a fraction of them.
            device: a torch device.
            dtype: `float32`, `bfloat16`, `float16`, or `auto`.
            device_map: spreads the model over devices and disk instead of `device`, as in `load`.
            quantization: `bnb-4bit`, `bnb-8bit`, `torchao-int8` or `torchao-int4`.
            attn: the attention kernel, as in `load`.
            adapter: the folder or hub name of a PEFT adapter (LoRA) on the model.
            compile: whether the language model's layers run prompts compiled.
            hyperparameters: of the pruner.

        Raises:
            InputError: if the checkpoint cannot be loaded, or the pruner refuses its options.
        """
        built = build(pruner, budget=budget, **hyperparameters)
        loaded = load(
            name, device, dtype, device_map=device_map, quantization=quantization, attn=attn,
            adapter=adapter,
        )  # fmt: skip
        return cls(*loaded, built, compile)

    def answer(
        self,
        image: ImageSource | VideoClip,
        question: str,
        frames: int = 32,
        fps: float | None = None,
        **generation: Any,
    ) -> str:
        """Returns the model's reply to one question about one image or video.

        Args:
            image: a file, a Pillow image or an array; or a video file or a `VideoClip`.
            question: about it.
            frames: of a video file, at most, at even distances.
            fps: frames for each second of a video file instead, `frames` at most.
            generation: arguments of the model's `generate`.

        Raises:
            InputError: if image, video or question cannot be used.
        """
        return self.replies([open_visual(image, frames, fps)], [question], **generation)[0].text

    def replies(
        self,
        images: Sequence[ImageSource | VideoClip],
        questions: Sequence[str],
        **generation: Any,
    ) -> list["Reply"]:
        """Returns the replies to several images or videos at once, one question about each.

        Args:
            images: files, Pillow images or arrays; video files, of which 32 frames are read, or clips.
            questions: as many.
            generation: arguments of the model's `generate`.

        Raises:
            InputError: if an image or a question cannot be used, there are more of one than of the
                other, or more than one reply to each question is asked for.
        """
        if len(images) != len(questions):
            raise InputError(f"{len(images)} images do not go with {len(questions)} questions")
        if generation.get("num_return_sequences", 1) != 1:
            raise InputError("there is one reply to each question; leave out num_return_sequences")
        visuals = [open_visual(medium) for medium in images]
        clips = [visual for visual in visuals if isinstance(visual, VideoClip)]
        kinds = ["video" if isinstance(visual, VideoClip) else "image" for visual in visuals]
        prompts = [
            render(
                self.processor,
                [{"role": "user", "content": [{"type": kind}, {"type": "text", "text": text}]}],
                add_generation_prompt=True,
            )
            for kind, text in zip(kinds, questions, strict=True)
        ]
        rows = [[] if isinstance(visual, VideoClip) else [visual] for visual in visuals]
        inputs = encode_prompts(self.model, self.processor, prompts, rows, clips)
        config, tokens = family_of(self.model).decoder.config, inputs["input_ids"].shape[1]
        if tokens > (most := getattr(config, "max_position_embeddings", tokens)):
            raise InputError(
                f"a prompt has {tokens} tokens, above the {most} that the model takes; give a shorter one"
            )
        frames = video_frames_of(self.model, self.processor, prompts, clips)
        own = {} if frames is None else {"video_frames": frames}
        block = nullcontext() if self.pruner is None else self.pruner(self.model, **own)
        whole = compiled_prefill(self.model) if self.compile else nullcontext()
        # a model is inside one block at a time
        with self.lock, torch.inference_mode(), whole, block as trace:
            output = self.model.generate(**inputs, **generation)
        output = output if isinstance(output, torch.Tensor) else output.sequences
        texts = self.processor.batch_decode(
            output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
        # frames, rows and columns of those that are videos, in the order of the prompts
        grids = iter(family_of(self.model).video_grids(dict(inputs) | own) if clips else [])
        medium_grids = [next(grids) if kind == "video" else None for kind in kinds]
        counts: list[tuple[int | None, int | None, Tensor | None]] = [(None,) * 3] * len(texts)
        if trace is not None:
            # beam search repeats a prompt with its image, whose first copy counts
            copies = len(trace.available) // len(texts)
            kept = trace.kept[::copies]
            counts = list(zip(trace.available[::copies], map(len, kept), kept, strict=True))
        return [
            Reply(text.strip(), *each, grid)
            for text, each, grid in zip(texts, counts, medium_grids, strict=True)
        ]


@dataclass(frozen=True)
class Reply:
    """An answer, how many tokens its image or video had, and how many were left at the end of pruning.

    For methods that prune inside the language model the latter are those of its last layer, fewer
    than the budget, which is a mean over layers. Without a pruner both are None.

    Args:
        text: the answer.
        image_tokens: of the image or video.
        kept_tokens: left at the end.
        kept: their indices, (k,).
        grid: frames, rows and columns of a video's tokens; None for images.
    """

    text: str
    image_tokens: int | None
    kept_tokens: int | None
    kept: Tensor | None = field(default=None, compare=False, repr=False)
    grid: tuple[int, int, int] | None = None
