"""A language model of the embedded model's shape that learns text alone."""

import torch
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from vlm_prune.benchmarks.embedded_models.initial import look_back
from vlm_prune.benchmarks.embedded_models.language import Row, train_language
from vlm_prune.benchmarks.embedded_models.llava import TrainingData, add_look_back_for
from vlm_prune.benchmarks.embedded_models.log import Say


def train_text(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    source: TrainingData,
    steps: int,
    say: Say,
    seed: int = 0,
    bf16: bool = False,
) -> None:
    """Teaches a new model's language model text alone; the rest of `model` stays as it is.

    Its first layer looks back from the start, as the embedded model's does after `add_look_back_for`.

    Args:
        model: the embedded LLaVA, trained in place.
        processor: the model's.
        source: of the text.
        steps: of the optimizers.
        say: takes loss and shares every 50 steps.
        seed: of the text.
        bf16: whether the decoder runs in mixed precision.
    """
    decoder = model.model.language_model
    look_back(decoder)
    add_look_back_for(source, model, processor)
    rng = torch.Generator().manual_seed(seed)

    def rows(_: int) -> list[Row]:
        seeds: list[int] = torch.randint(2**62, (12,), generator=rng).tolist()
        return [source.prose(12, one) for one in seeds]

    train_language(
        model, processor.tokenizer, rows, steps, 1e-3, torch.cat, [decoder], say, bf16=bf16
    )
