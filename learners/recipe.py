"""How Wings and its baselines are trained: hyperparameters by stage, and what each method opens."""

import re
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn
from transformers import get_cosine_schedule_with_warmup

from vlm_prune.learners.config import MODALITIES, Modality, WingsConfig
from vlm_prune.learners.model import wings_layers
from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.common.registry import Registry
from vlm_prune.vlm.families import family_of
from vlm_prune.vlm.projector import Projector

GroupName = Literal["projector", "learners", "language"]
LanguageTraining = Literal["full", "attn-proj", "mlp-gate-up", "model-dowser", "lora", "frozen"]
OPENED: dict[LanguageTraining, str] = {
    "full": "",
    "attn-proj": r"\.[qkvo]_proj\.",
    "mlp-gate-up": r"\.(gate|up|gate_up)_proj\b",
    "model-dowser": r"\.parametrizations\.weight\.0\.values$",
    "lora": "lora_",
}


@dataclass(frozen=True)
class StageRecipe:
    """One stage's hyperparameters; AdamW with a cosine schedule.

    Args:
        stage: 1 aligns projector and visual learners with a frozen language model, 2 instructs.
        language_lr, projector_lr, learner_lr: peak learning rate of each part.
        batch: samples per optimizer step, over all processes.
        weight_decay: of AdamW.
        epochs: passes over the data.
        warmup: share of the steps in which the rates rise.
        clip: largest gradient norm.
        max_length: tokens, image tokens included, above which a sample is refused or left out.
        seed: of data order, new weights and dropout.
        lora_rank: of the `lora` method, whose alpha is twice that, as in LLaVA.
    """

    stage: Literal[1, 2]
    language_lr: float
    projector_lr: float
    learner_lr: float
    batch: int
    weight_decay: float
    epochs: int = 1
    warmup: float = 0.03
    clip: float = 1.0
    max_length: int = 2048
    seed: int = 42
    lora_rank: int = 128

    def rates(self, method: "TrainingMethod") -> str:
        """Returns the peak rates in words: no result can be compared without them."""
        language = self.language_lr if self.stage == 2 and method.language != "frozen" else 0
        learners = self.learner_lr if method.config(WingsConfig(), self.stage) else 0
        return (
            f"stage {self.stage} with learning rates {language:g} (language model), "
            f"{self.projector_lr:g} (projector), {learners:g} (learners)"
        )


_PAPER_1 = StageRecipe(1, 0, 1e-3, 1e-3, batch=32, weight_decay=1e-9)
_PAPER_2 = StageRecipe(2, 2e-6, 1e-5, 2e-6, batch=32, weight_decay=1e-8)

PRESETS: Registry[StageRecipe] = Registry(
    "preset",
    {
        # rates and batches of the paper, weight decay of its scripts
        "paper-1": _PAPER_1,
        "paper-2": _PAPER_2,
        # the authors' scripts
        "scripts-1-qwen": replace(_PAPER_1, projector_lr=2e-5, learner_lr=2e-5, batch=256),
        "scripts-1-llama": replace(_PAPER_1, projector_lr=2e-4, learner_lr=2e-4, batch=256),
        "scripts-2": replace(_PAPER_2, batch=64),
        # their LLaVA baseline has ten times Wings' rate: compare with an equal one, too
        "scripts-2-llava": replace(_PAPER_2, language_lr=2e-5, batch=64),
        # between the two disagreeing sources
        "recommended-1": replace(_PAPER_1, learner_lr=2e-4, batch=256),
    },
)


@dataclass(frozen=True)
class TrainingMethod:
    """What is trained in stage 2. Stage 1 always trains the projector and the visual learner, if any.

    Args:
        language: how the language model is tuned: `full`; `attn-proj`, its attention's projections
            alone, or `mlp-gate-up`, its MLPs' first layers alone, https://arxiv.org/abs/2510.08564;
            `model-dowser`, the least important weights of each linear map; `lora`; or `frozen`.
        modalities: the learners.
        routed: whether a router weighs them.
        text_ratio: default share of text-only samples; None takes the data as they are.
    """

    language: LanguageTraining
    modalities: tuple[Modality, ...] = ()
    routed: bool = False
    text_ratio: float | None = None

    def config(self, base: WingsConfig, stage: int) -> WingsConfig | None:
        """Returns the learners in a stage, with all other options from
        `base`; None if there are none.
        """
        names: tuple[Modality, ...] = tuple(
            name for name in self.modalities if stage == 2 or name == "visual"
        )
        if not names:
            return None
        return replace(base, modalities=names, router=base.router if self.routed else "none")


METHODS: Registry[TrainingMethod] = Registry(
    "method",
    {
        "full": TrainingMethod("full"),
        "attn-proj": TrainingMethod("attn-proj"),
        "mlp-gate-up": TrainingMethod("mlp-gate-up"),
        "model-dowser": TrainingMethod("model-dowser"),
        "lora": TrainingMethod("lora"),
        "frozen-llm": TrainingMethod("frozen", ("visual",)),
        "replay": TrainingMethod("full", text_ratio=0.1),
        "wings": TrainingMethod("full", MODALITIES, routed=True),
        "wings-visual": TrainingMethod("full", ("visual",)),
        "wings-textual": TrainingMethod("full", ("textual",)),
        "wings-no-router": TrainingMethod("full", MODALITIES),
    },
)


def open_parameters(
    model: Any, method: TrainingMethod, stage: int
) -> dict[GroupName, list[nn.Parameter]]:
    """Freezes all but what a stage trains, and returns that by learning-rate group.

    With `full` the language model opens as a whole: layers, embeddings, norms and head. LoRA
    weights must be in place already, Model-Dowser's entries and learners too. The vision tower never
    trains.

    Args:
        model: with its LoRA weights or learners in place.
        method: what is trained.
        stage: 1 or 2.
    """
    family = family_of(model)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    projector = family.projector
    if not isinstance(projector, Projector):
        raise InputError("training needs a projector of two layers, as LLaVA has")
    groups: dict[GroupName, list[nn.Parameter]] = {
        "projector": projector.parameters(),
        "learners": [],
        "language": [],
    }
    if method.config(WingsConfig(), stage) is not None:
        for layer in wings_layers(model).values():
            groups["learners"] += layer.parameters()
    if stage == 2 and method.language != "frozen":
        named = [
            *family.decoder.named_parameters(),
            *model.get_output_embeddings().named_parameters(),
        ]
        learner_parameters = {id(parameter) for parameter in groups["learners"]}
        unique = {
            id(parameter): parameter
            for name, parameter in named
            if id(parameter) not in learner_parameters and re.search(OPENED[method.language], name)
        }
        groups["language"] = list(unique.values())
    for parameters in groups.values():
        for parameter in parameters:
            parameter.requires_grad_(True)
    return groups


def make_optimizer(
    groups: dict[GroupName, list[nn.Parameter]], recipe: StageRecipe, steps: int, done: int = 0
) -> tuple[torch.optim.AdamW, Any]:
    """Returns AdamW with each group's own rate, and a cosine schedule over `steps` as it is after
    `done`.

    Args:
        groups: parameters by learning-rate group.
        recipe: the stage's hyperparameters.
        steps: of the whole training.
        done: of them before this optimizer was made.
    """
    rates = {
        "projector": recipe.projector_lr,
        "learners": recipe.learner_lr,
        "language": recipe.language_lr,
    }
    optimizer = torch.optim.AdamW(
        [
            {"params": p, "lr": rates[name], "initial_lr": rates[name]}
            for name, p in groups.items()
            if p
        ],
        weight_decay=recipe.weight_decay,
        fused=True,
    )
    warmup = round(recipe.warmup * steps)
    schedule = get_cosine_schedule_with_warmup(optimizer, warmup, steps, last_epoch=done - 1)
    return optimizer, schedule
