"""A text-only language model, asked with its own chat template."""

from typing import Any

import torch
from torch import Tensor

from vlm_prune.vlm.chat import Messages, encode_text, render, special_tokens
from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.load import load_language


class Language:
    """A causal language model with its tokenizer.

    Args:
        name: a checkpoint folder or a hub name.
        device: a torch device.
        dtype: float32, bfloat16, float16, or auto.

    Raises:
        InputError: if it cannot be loaded, or its tokenizer has no chat template.
    """

    def __init__(self, name: str, device: str = "cpu", dtype: str = "auto") -> None:
        self.name = name
        self.model, self.tokenizer = load_language(name, device, dtype)
        if not self.tokenizer.chat_template:
            raise InputError(
                f"{name!r} has no chat template; give a model tuned for chats, or put a "
                "chat_template.jinja into its folder"
            )
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token

    def render(self, messages: Messages) -> str:
        """Renders a conversation up to where the model speaks.

        Templates take a message as one string or in parts, and drop what is in the other form.

        Raises:
            InputError: if the template takes neither.
        """
        whole = [
            {"role": turn["role"], "content": "".join(part["text"] for part in turn["content"])}
            for turn in messages
        ]
        hidden = [special_tokens(self.tokenizer).hide(turn["content"]) for turn in whole]
        for form in (whole, messages):
            try:
                text = render(self.tokenizer, form, add_generation_prompt=True)
            except InputError:
                continue
            if all(content.strip() in text for content in hidden):
                return text
        raise InputError(f"the chat template of {self.name!r} does not take such a conversation")

    @torch.inference_mode()
    def generate(self, texts: list[str], **options: Any) -> tuple[Tensor, list[int]]:
        """Returns new tokens (B, T) of rendered prompts, greedy unless `options` say
        otherwise, and the prompts' lengths.
        """
        ids = [encode_text(self.tokenizer, text) for text in texts]
        inputs = self.tokenizer.pad(
            {"input_ids": ids}, padding_side="left", return_tensors="pt"
        ).to(self.model.device)  # fmt: skip
        tensors = {key: inputs[key] for key in ("input_ids", "attention_mask")}
        output = self.model.generate(
            **tensors,
            **{"do_sample": False, "pad_token_id": self.tokenizer.pad_token_id} | options,
        )
        lengths: list[int] = tensors["attention_mask"].sum(1).tolist()
        return output[:, tensors["input_ids"].shape[1] :], lengths

    def replies(self, tokens: Tensor) -> list[str]:
        """Returns the texts of new tokens (B, T)."""
        return [
            str(reply).strip()
            for reply in self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        ]
