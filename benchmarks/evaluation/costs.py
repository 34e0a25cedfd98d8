"""What a live model tells a record: operations and key-value bytes of a prompt, and the machine."""

from typing import Any

from vlm_prune.benchmarks.evaluation.environment import device_name
from vlm_prune.benchmarks.evaluation.records import Costs, Machine, PromptRecord
from vlm_prune.learners.cost import learner_flops, router_flops
from vlm_prune.vlm.common.timing import peak_bytes
from vlm_prune.vlm.cost import key_value_bytes, prefill_flops
from vlm_prune.vlm.families import family_of


def paired_costs(model: Any, prompt: PromptRecord) -> tuple[Costs, Costs]:
    """Returns FLOPs of tower and prefill, and bytes of keys and values after
    it, without and with pruning.

    Attention counts whole, or on both sides by the causal half where it is sparse.

    Args:
        model: with its Wings learners, if it has any.
        prompt: pruned.
    """
    layers, text = len(family_of(model).decoder.layers), model.config.get_text_config()
    unpruned = [float(sum(prompt.image_tokens))] * layers
    pruned = [prompt.images * tokens for tokens in prompt.layer_tokens]
    learners = getattr(model, "wings", None)

    def flops(tower: float, per_layer: list[float], densities: list[float]) -> float:
        total = tower + prefill_flops(text, prompt.text_tokens, per_layer, densities or None)
        if learners is not None:
            added = text, learners.config, prompt.text_tokens, per_layer
            total += learner_flops(*added) + router_flops(*added, fused=model.device.type == "cpu")
        return total

    def held(per_layer: list[float]) -> float:
        return key_value_bytes(text, prompt.text_tokens, per_layer, model.dtype.itemsize)

    tower = prompt.vision_flops
    smaller = tower if prompt.pruned_vision_flops is None else prompt.pruned_vision_flops
    return (
        Costs(
            baseline=flops(tower, unpruned, [1.0] * len(prompt.densities)),
            pruned=flops(smaller, pruned, prompt.densities),
        ),
        Costs(baseline=held(unpruned), pruned=held(pruned)),
    )


def machine_of(model: Any) -> Machine:
    """Returns where a model runs, the most memory that was held so far, and how
    many tokens its images have.
    """
    family = family_of(model)
    return Machine(
        device=device_name(model.device),
        peak_memory_bytes=peak_bytes(model.device),
        tokens_per_image=family.tokens_per_image if family.fixed_size else None,
    )
