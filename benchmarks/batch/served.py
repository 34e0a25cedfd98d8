"""A model of `map`'s pool that vLLM serves, with our plug-in."""

from collections.abc import Sequence
from typing import Any

from PIL.Image import Image

from vlm_prune.benchmarks.evaluation.records import Variant
from vlm_prune.pruning.pipeline import Reply
from vlm_prune.vlm.common.errors import InputError, first_line
from vlm_prune.vlm.common.video import VideoClip
from vlm_prune.vlm.load import EMBEDDED
from vlm_prune.vlm.serving.server import check_served
from vlm_prune.vlm.serving.settings import KEY, Settings


def settings_of(model: str, variant: Variant) -> Settings:
    """The settings of an engine that keeps what the variant keeps.

    Raises:
        InputError: if vLLM is missing, or cannot serve the model so.
    """
    settings = Settings.read(
        {"method": variant.method, "budget": variant.budget, "arguments": variant.with_positions}
    )
    check_served(model, settings)
    return settings


class ServedVLM:
    """An engine in this process; it answers as `PrunedVLM` does.

    Args:
        model: `tiny`, `smol`, a checkpoint folder, or a hub name.
        variant: the method.
        device: `cpu`, or the kind of GPU.
        dtype: as for `load`.

    Raises:
        InputError: if vLLM is missing, or the engine does not start.
    """

    def __init__(self, model: str, variant: Variant, device: str, dtype: str) -> None:
        settings = settings_of(model, variant)
        from vllm import LLM

        try:
            self.llm = LLM(
                str(EMBEDDED.get(model, model)),
                dtype="float32" if dtype == "auto" and device == "cpu" else dtype,
                limit_mm_per_prompt={"image": 1}, additional_config={KEY: settings.as_dict()},
            )  # fmt: skip
        except (RuntimeError, ValueError, OSError) as error:
            raise InputError(f"vLLM does not start: {first_line(error)}") from error
        config = self.llm.llm_engine.model_config.hf_config
        self.image_token = getattr(config, "image_token_id", None) or config.image_token_index

    def replies(
        self, images: Sequence[Image | VideoClip], questions: Sequence[str], **generation: Any
    ) -> list[Reply]:
        """One greedy answer about each image; `max_new_tokens` is the model's own unless given.

        vLLM does not say how many tokens an image had: `Reply.image_tokens` is None.

        Raises:
            InputError: for a video.
        """
        if any(isinstance(image, VideoClip) for image in images):
            raise InputError("videos are not answered by vLLM here; leave out --engine vllm")
        sampling = self.llm.get_default_sampling_params()
        sampling.temperature = 0.0
        sampling.max_tokens = generation.get("max_new_tokens", sampling.max_tokens)
        chats = [
            [{"role": "user", "content": [
                {"type": "image_pil", "image_pil": image}, {"type": "text", "text": question},
            ]}]
            for image, question in zip(images, questions, strict=True)
        ]  # fmt: skip
        outputs = self.llm.chat(chats, sampling, use_tqdm=False)
        return [
            Reply(
                output.outputs[0].text.strip(), None,
                output.prompt_token_ids.count(self.image_token),
            )
            for output in outputs
        ]  # fmt: skip
