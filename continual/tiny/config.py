"""The embedded CLIP's architecture and tokenizer: an open_clip folder with a config and no weights."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from vlm_prune.vlm.common.state import writing

CONTEXT = 20
CONFIG = "open_clip_config.json"
WEIGHTS = "open_clip_model.safetensors"


def make_tokenizer(corpus: Iterable[str], vocabulary: int = 512) -> PreTrainedTokenizerFast:
    """Makes a byte-level BPE tokenizer from `corpus`; the end token
    has the highest id, as in CLIP.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - 2,
        special_tokens=["<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.add_special_tokens(["<start>", "<end>"])
    ends = [(token, tokenizer.token_to_id(token)) for token in ("<start>", "<end>")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=ends
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<start>", eos_token="<end>"
    )


def model_config(vocabulary: int, width: int = 128, layers: int = 4) -> dict[str, Any]:
    """Returns an open_clip model config: 48 px images in patches of 8, and texts of 20 tokens.

    Args:
        vocabulary: tokens of the tokenizer.
        width: of both towers.
        layers: of both towers.
    """
    return {
        "embed_dim": width,
        "vision_cfg": {
            "image_size": 48,
            "patch_size": 8,
            "layers": layers,
            "width": width,
            "head_width": 32,
        },
        "text_cfg": {
            "context_length": CONTEXT,
            "vocab_size": vocabulary,
            "hf_tokenizer_name": "tokenizer.json",  # open_clip then reads it from this folder
            "width": width,
            "heads": width // 32,
            "layers": max(1, layers - 2),
        },
    }


def write_clip_folder(
    folder: Path, corpus: Iterable[str], width: int = 128, layers: int = 4
) -> None:
    """Writes config and tokenizer in the layout of open_clip's `local-dir:`.

    Args:
        folder: to write into.
        corpus: texts that the tokenizer learns from.
        width: of both towers.
        layers: of both towers.
    """
    tokenizer = make_tokenizer(corpus)
    with writing(folder):
        tokenizer.save_pretrained(folder)
    config = {
        "model_cfg": model_config(len(tokenizer), width, layers),
        "preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.3, 0.3, 0.3]},
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
