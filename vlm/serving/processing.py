"""The prompt's side: as many placeholders as the method keeps, and cache keys of their own."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from vllm.multimodal.hasher import MultiModalHasher
from vllm.multimodal.parse import DictEmbeddingItems, EmbeddingItems
from vllm.multimodal.processing import PromptReplacement, PromptUpdateDetails

from vlm_prune.vlm.serving.metrics import observe
from vlm_prune.vlm.serving.settings import KEY, Settings, kept_tokens


class PrunedProcessor:
    """Mixed in before a processor of vLLM: images have as many placeholders as tokens are kept.

    Images that come as embeddings keep theirs.
    """

    info: Any
    measuring = False

    @cached_property
    def settings(self) -> Settings:
        return Settings(**getattr(self.info.ctx.model_config.hf_config, KEY))

    @cached_property
    def pruner(self) -> Any:
        return self.settings.pruner()

    def newlines(self, items: Any, index: int) -> int:
        """Returns how many placeholders of an image have no pixels behind them."""
        return 0

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, Any], out_mm_kwargs: Any
    ) -> Sequence[Any]:
        updates = super()._get_prompt_updates(  # type: ignore[misc]
            mm_items, hf_processor_mm_kwargs, out_mm_kwargs
        )
        images = mm_items.get("image")
        if images is None or isinstance(images, EmbeddingItems | DictEmbeddingItems):
            return list(updates)
        return [
            replace(update, replacement=self._shortened(update, images))
            if isinstance(update, PromptReplacement) and update.modality == "image"
            else update
            for update in updates
        ]

    def _shortened(self, update: Any, images: Any) -> Callable[[int], Any]:
        def content(index: int) -> Any:
            whole = update.resolve(index).content
            placeholder = (
                torch.ones(len(whole.full), dtype=torch.bool)
                if whole.is_embed is None
                else whole.is_embed(whole.full)
            ).tolist()
            available = sum(placeholder)
            tokens = available - self.newlines(images, index)
            left = kept_tokens(self.pruner, tokens, available)
            # the first placeholders stay, with markers between them
            ids = []
            for token, is_embed in zip(whole.full, placeholder, strict=True):
                if not is_embed or left > 0:
                    ids.append(token)
                left -= is_embed
            return PromptUpdateDetails(full=ids, is_embed=whole.is_embed)

        return content

    def _get_mm_hashes(self, inputs: Any) -> Any:
        hashes = dict(super()._get_mm_hashes(inputs))  # type: ignore[misc]
        algorithm = self.info.ctx.get_mm_config().mm_hasher_algorithm
        identity = self.settings.identity
        if "image" in hashes:
            hashes["image"] = [
                MultiModalHasher.hash_kwargs(algorithm, image=digest, vlm_prune=identity)
                for digest in hashes["image"]
            ]
        return hashes

    def get_dummy_mm_inputs(self, *args: Any, **kwargs: Any) -> Any:
        """Returns what vLLM measures itself with; no image of a user."""
        self.measuring = True
        try:
            return super().get_dummy_mm_inputs(*args, **kwargs)  # type: ignore[misc]
        finally:
            self.measuring = False

    def _maybe_apply_prompt_updates(self, mm_items: Any, mm_res: Any) -> Any:
        prompt, placeholders = super()._maybe_apply_prompt_updates(  # type: ignore[misc]
            mm_items, mm_res
        )
        for image in () if self.measuring else placeholders.get("image", ()):
            observe(image.to_range().get_num_embeds())
        return prompt, placeholders
