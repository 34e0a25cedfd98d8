"""The embedded LLaVA-OneVision, which takes videos: its parts are real Hugging Face classes.

The package has its projector and language model; the vision tower is that of `tiny`, cut to half the
sides. What is put together is kept in a cache folder.
"""

import hashlib
from pathlib import Path
from typing import Any

from vlm_prune.vlm.smol.base import cached, digest
from vlm_prune.vlm.tiny import checkpoint_path
from vlm_prune.vlm.tiny.config import CHAT_TEMPLATE

WEIGHTS = "model.safetensors"
SIDE_TOKENS = 12  # patches along a side of a frame, of 14 pixels
VIDEO_TOKEN = "<video>"
CHAT = CHAT_TEMPLATE.replace(
    "<image>\n{% else %}", "<image>\n{% elif part['type'] == 'video' %}<video>\n{% else %}"
)


def video_weights() -> Path:
    """Returns the folder of the packaged projector and language model."""
    return Path(__file__).parent / "video_weights"


def tiny_video_path() -> Path:
    """Returns the folder of the whole model, for `from_pretrained`; it is made on first use."""
    parts = (video_weights() / WEIGHTS, checkpoint_path() / "model.safetensors")
    key = hashlib.sha256("".join(map(digest, parts)).encode()).hexdigest()[:16]
    return cached(f"tiny-video-{key}", assemble_video)


def assemble_video(folder: Path) -> None:
    """Writes the packaged weights and `tiny`'s tower as one plain checkpoint.

    Args:
        folder: where to.
    """
    from vlm_prune.vlm.common.state import restore
    from vlm_prune.vlm.stored_weights import halve_weights, rename_weights

    model, processor = video_model()
    restore(video_weights() / WEIGHTS, trained_tensors(model))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    halve_weights(folder / "model.safetensors")
    rename_weights(folder)


def trained_tensors(model: Any) -> dict[str, Any]:
    """Returns what is trained of the model by name: all but the tower."""
    return {
        name: tensor
        for name, tensor in model.model.named_parameters()
        if not name.startswith("vision_tower.")
    }


def video_processor() -> Any:
    """Returns LLaVA-OneVision's processor for frames of 168 px, over `tiny`'s
    tokenizer, which learns the video's token.
    """
    from transformers import (
        AutoTokenizer,
        LlavaOnevisionImageProcessor,
        LlavaOnevisionProcessor,
        LlavaOnevisionVideoProcessor,
    )

    tokens = {"image_token": "<image>", "video_token": VIDEO_TOKEN}
    tokenizer = AutoTokenizer.from_pretrained(
        checkpoint_path(), extra_special_tokens=tokens, padding_side="left"
    )
    side = 14 * SIDE_TOKENS
    size = {"height": side, "width": side}
    return LlavaOnevisionProcessor(
        image_processor=LlavaOnevisionImageProcessor(
            size=size, image_grid_pinpoints=[[side, side]]
        ),
        tokenizer=tokenizer,
        video_processor=LlavaOnevisionVideoProcessor(size=size),
        # with the CLS token, which `default` leaves out
        num_image_tokens=SIDE_TOKENS**2 + 1,
        vision_feature_select_strategy="default",
        chat_template=CHAT,
    )


def video_model() -> tuple[Any, Any]:
    """Returns a LLaVA-OneVision of `tiny`'s weights, and its processor.

    Its tower has the positions in the middle of `tiny`'s; the token of a video has the embedding of
    that of an image.
    """
    import torch
    from transformers import (
        LlavaForConditionalGeneration,
        LlavaOnevisionConfig,
        LlavaOnevisionForConditionalGeneration,
    )

    tiny = LlavaForConditionalGeneration.from_pretrained(checkpoint_path(), dtype=torch.float32)
    processor = video_processor()
    tokenizer = processor.tokenizer
    vision, text = tiny.config.vision_config.to_dict(), tiny.config.text_config.to_dict()
    grid = vision["image_size"] // vision["patch_size"]
    side = SIDE_TOKENS * vision["patch_size"]
    config = LlavaOnevisionConfig(
        vision_config=vision | {"image_size": side},
        text_config=text | {"vocab_size": len(tokenizer), "max_position_embeddings": 16384},
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids(VIDEO_TOKEN),
        image_grid_pinpoints=[[side, side]],
        vision_feature_layer=tiny.config.vision_feature_layer,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )
    model = LlavaOnevisionForConditionalGeneration(config)
    state = tiny.model.state_dict()
    (table,) = (name for name in state if name.endswith("position_embedding.weight"))
    start = (grid - SIDE_TOKENS) // 2
    # CLS, and a square in the middle of the grid
    middle = state[table][1:].unflatten(0, (grid, grid))
    middle = middle[start : start + SIDE_TOKENS, start : start + SIDE_TOKENS].flatten(0, 1)
    state[table] = torch.cat([state[table][:1], middle])
    words = state["language_model.embed_tokens.weight"]
    added = words[config.image_token_id].expand(len(tokenizer) - len(words), -1)
    state["language_model.embed_tokens.weight"] = torch.cat([words, added])
    state["image_newline"] = torch.zeros(text["hidden_size"])
    model.model.load_state_dict(state)
    model.tie_weights()
    ids = {key: getattr(tiny.generation_config, key) for key in ("bos_token_id", "eos_token_id")}
    pad = tiny.generation_config.pad_token_id
    model.generation_config.update(**ids, pad_token_id=pad, do_sample=False, max_new_tokens=16)
    return model, processor
