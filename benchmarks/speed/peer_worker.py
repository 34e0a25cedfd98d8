"""A process that times one method on a random LLaVA, each time that a line arrives on its input.

It runs under another interpreter, too, for a method's released code, and so imports nothing of ours
but for our own methods. Each answer is one line of JSON: processor seconds up to the first token,
of that what making the image's tokens takes (tower, projector and selection), and selection alone,
which is null where it is part of a changed tower.
"""

import contextlib
import functools
import importlib
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

TOWER = {
    "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 24,
    "num_attention_heads": 4, "image_size": 336, "patch_size": 14,
}  # fmt: skip
LANGUAGE = {
    "vocab_size": 32000, "hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8,
    "num_attention_heads": 8, "num_key_value_heads": 8, "max_position_embeddings": 4096,
}  # fmt: skip
TEXT = 60
IMAGE_WORD = 31999
"""The word that stands for image tokens in our prompts."""


class Stopwatch:
    """Processor seconds that calls of a method of an object take.

    Args:
        owner: the object, whose method is replaced by one that is timed.
        name: of the method.
    """

    def __init__(self, owner: Any, name: str) -> None:
        self.seconds, self.method = 0.0, getattr(owner, name)
        # transformers reads the signature
        functools.update_wrapper(self, self.method)
        setattr(owner, name, self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        start = time.process_time()
        output = self.method(*args, **kwargs)
        self.seconds += time.process_time() - start
        return output


Measure = Callable[[], tuple[float, float, float | None]]


def released(method: str, budget: int) -> Measure:
    """Returns what measures the original LLaVA, as a method's release changes it.

    Args:
        method: `none`, or a package of the release: `visionzip` or `flowcut`.
        budget: tokens to keep of an image.
    """
    transformers = importlib.import_module("transformers")
    llava = importlib.import_module("llava.model.language_model.llava_llama")
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        tower = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**TOWER))
        tower.save_pretrained(folder)
        transformers.CLIPImageProcessor(size={"shortest_edge": 336}, crop_size=336).save_pretrained(
            folder
        )
        config = llava.LlavaConfig(
            **LANGUAGE, mm_vision_tower=folder, mm_hidden_size=TOWER["hidden_size"],
            mm_projector_type="mlp2x_gelu", mm_vision_select_layer=-2,
            mm_vision_select_feature="patch", tune_mm_mlp_adapter=False,
        )  # fmt: skip
        config.mm_use_im_start_end = config.mm_use_im_patch_token = False
        model = llava.LlavaLlamaForCausalLM(config)
        model.get_vision_tower().load_model()
    model.eval()
    if method == "visionzip":
        contextual = round(budget * 10 / 64)
        model = importlib.import_module("visionzip").visionzip(
            model, dominant=budget - contextual, contextual=contextual
        )
    elif method == "flowcut":
        importlib.import_module("flowcut.main").flowcut(model, target_num=budget)
    name = "encode_images" if method == "none" else f"encode_images_{method}"
    encoding = Stopwatch(model, name)
    pixels = torch.randn(1, 3, 336, 336)
    ids = torch.randint(10, 31000, (1, TEXT))
    ids[0, 5] = -200

    def measure() -> tuple[float, float, float | None]:
        encoding.seconds, start = 0.0, time.process_time()
        model.generate(
            ids, images=pixels, image_sizes=[(336, 336)], do_sample=False, max_new_tokens=1
        )
        first = time.process_time() - start
        return first, encoding.seconds, 0.0 if method == "none" else None

    return measure


def ours(method: str, budget: int) -> Measure:
    """Returns what measures an unmodified Hugging Face LLaVA of the same shape with our method.

    Args:
        method: a name of ours; `none` for the model itself.
        budget: tokens to keep of an image.
    """
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig
    from transformers import LlavaForConditionalGeneration as Llava

    from vlm_prune.pruning.registry import build

    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**TOWER), text_config=LlamaConfig(**LANGUAGE),
        image_token_index=IMAGE_WORD, vision_feature_layer=-2,
    )  # fmt: skip
    model = Llava(config).eval()
    pruner: Any = None if method == "none" else build(method, budget=budget)
    encoding = Stopwatch(model.model, "get_image_features")
    pixels = torch.randn(1, 3, 336, 336)
    ids = torch.randint(10, 31000, (1, TEXT - 1 + 576))
    ids[0, 5 : 5 + 576] = IMAGE_WORD
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}

    def measure() -> tuple[float, float, float | None]:
        encoding.seconds, start = 0.0, time.process_time()
        with contextlib.nullcontext() if pruner is None else pruner(model) as trace:
            model.generate(**inputs, do_sample=False, max_new_tokens=1)
        first = time.process_time() - start
        if trace is None:
            return first, encoding.seconds, 0.0
        return first, trace.vision_s + trace.selection_s, trace.selection_s

    return measure


def main() -> None:
    """Says `ready`, then answers each line."""
    side, method, budget = sys.argv[1], sys.argv[2], int(sys.argv[3])
    torch.set_num_threads(1)
    # our pruners time themselves by the clock, which counts what other processes take
    time.perf_counter = time.process_time
    # what libraries print must not stand among the answers
    answers, sys.stdout = sys.stdout, sys.stderr
    with torch.inference_mode():
        measure = {"ours": ours, "released": released}[side](method, budget)
        measure()
        print(json.dumps("ready"), file=answers, flush=True)
        for _ in sys.stdin:
            print(json.dumps(measure()), file=answers, flush=True)


if __name__ == "__main__":
    # the folder of this file would otherwise come first among those that modules are found in
    sys.path.remove(str(Path(__file__).resolve().parent))
    main()
