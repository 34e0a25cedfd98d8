"""What the experiment compares, and with which settings."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from vlm_prune.learners import WingsConfig
from vlm_prune.learners.recipe import METHODS, StageRecipe
from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.common.registry import Registry


@dataclass(frozen=True)
class Plan:
    """Sizes and rates. The defaults take over two hours of one CPU core.

    Steps, patches and rates were chosen on validation scenes with seeds that are not among `seeds`.

    Args:
        model: the embedded model whose tower, projector's shape and language model, as it was before
            it saw images, the arms begin from.
        seeds: of projector, learners, data order and questions; each arm runs once for each.
        train_scenes, val_scenes, test_scenes: images of each split; val only chooses `alphas`.
        align_steps: fitting a random projector to word embeddings, before stage 1; with none it is
            the packaged model's.
        stage1_steps, stage2_steps: optimizer steps.
        images, questions: rows per step, and questions about each.
        patches: image tokens shown, in training and test: those of all objects and random others
            up to this number. Few of the 576 make reading an image learnable in this time.
        shift_rows: prompts for the attention shift; 72 in each of three seeds are over 200.
        rank: of the learners; LoRA's follows from it by equal parameters.
        stock_lr: full tuning's usual rate, at which it forgets.
        wings_lr: the language model's rate in Wings: a sixth of the stock rate, and a tenth in the
            authors' scripts.
        new_lr: of weights that are new to the language model (projector, learners, LoRA), the same
            in all arms and in both stages.
        projector_lr: of the projector where it is not new; None for `new_lr`.
        replay: share of text-only questions of the replay arm.
        alphas: what post-hoc merging tries.
        earlier_turns: text-only turns with their replies before questions without an image, from
            which a language model learns to answer in a word.
        text_tokens: of each held-out text whose next-token loss is measured.
        instructions: held-out ones that are answered, spread over all.
    """

    model: Literal["tiny", "smol"] = "tiny"
    seeds: tuple[int, ...] = (0, 1, 2)
    train_scenes: int = 240
    val_scenes: int = 12
    test_scenes: int = 108
    align_steps: int = 300
    stage1_steps: int = 80
    stage2_steps: int = 800
    images: int = 2
    questions: int = 12
    patches: int = 40
    shift_rows: int = 72
    rank: int = 16
    stock_lr: float = 3e-4
    wings_lr: float = 5e-5
    new_lr: float = 1e-3
    projector_lr: float | None = None
    replay: float = 0.1
    alphas: tuple[float, ...] = (0.25, 0.5, 0.75)
    earlier_turns: int = 0
    text_tokens: int = 0
    instructions: int = 0

    def __post_init__(self) -> None:
        for field, least in (("seeds", 1), ("alphas", 1)):
            if len(getattr(self, field)) < least:
                raise InputError(f"{field} is empty; give {least} or more")
        for field in ("train_scenes", "val_scenes", "test_scenes", "images", "questions", "rank"):
            if getattr(self, field) < 1:
                raise InputError(f"{field} {getattr(self, field)} is out of range; give 1 or more")

    @property
    def wings(self) -> WingsConfig:
        """Returns the learners' shape, with positions for the longest packed row."""
        return WingsConfig(rank=self.rank, max_positions=2048)

    def rate(self, arm: "Arm") -> str:
        """Returns the language model's learning rate in an arm, in words."""
        if arm.method is None or METHODS[arm.method].language == "frozen":
            return "merged" if arm.merged else "0"
        return f"{self._language_lr(arm):g}"

    def _language_lr(self, arm: "Arm") -> float:
        return {"stock": self.stock_lr, "wings": self.wings_lr, "new": self.new_lr}[arm.lr]

    def recipe(
        self, arm: "Arm", stage: Literal[1, 2], seed: int, lora_rank: int = 1
    ) -> StageRecipe:
        """Returns the hyperparameters of one stage; its `batch` counts rows.

        Args:
            arm: decides the language model's rate.
            stage: 1 trains projector and learners, 2 the language model, too.
            seed: of the run.
            lora_rank: of the arm with LoRA.
        """
        return StageRecipe(
            stage,
            language_lr=self._language_lr(arm),
            projector_lr=self.new_lr if self.projector_lr is None else self.projector_lr,
            learner_lr=self.new_lr,
            batch=self.images,
            weight_decay=0.0,
            seed=seed,
            lora_rank=lora_rank,
        )


@dataclass(frozen=True)
class Arm:
    """One way of teaching the language model to see.

    Args:
        title: in tables.
        method: which parameters train, from `METHODS`; None trains nothing.
        lr: which of the plan's rates the language model has.
        replay: whether text-only questions are mixed in.
        merged: made from the trained weights of `full` and the base, without training.
        stride: learners are in every so many decoder layers.
    """

    title: str
    method: str | None
    lr: Literal["stock", "wings", "new"] = "stock"
    replay: bool = False
    merged: bool = False
    stride: int = 1

    @property
    def trains_on_images_in_stage_1(self) -> bool:
        """Returns whether there is a visual learner to train beside the projector."""
        return self.method is not None and "visual" in METHODS[self.method].modalities


ARMS: Registry[Arm] = Registry(
    "arm",
    {
        "base": Arm("base LLM", None),
        "full": Arm("full tuning, stock LR", "full"),
        "full-low": Arm("full tuning, Wings' LR", "full", lr="wings"),
        "attn-proj": Arm("attention projections only", "attn-proj"),
        "mlp-gate-up": Arm("MLP gate and up only", "mlp-gate-up"),
        "model-dowser": Arm("Model-Dowser, 10 % of the weights", "model-dowser"),
        "lora": Arm("LoRA, matched parameters", "lora", lr="new"),
        "replay": Arm("10 % text replay", "full", replay=True),
        "frozen-llm": Arm("frozen LLM + visual learner", "frozen-llm"),
        "merge": Arm("post-hoc merge", None, merged=True),
        "wings": Arm("Wings", "wings", lr="wings"),
        "wings-stride-2": Arm("Wings in every second layer", "wings", lr="wings", stride=2),
        "wings-stride-3": Arm("Wings in every third layer", "wings", lr="wings", stride=3),
        "wings-visual": Arm("Wings without textual learner", "wings-visual", lr="wings"),
        "wings-textual": Arm("Wings without visual learner", "wings-textual", lr="wings"),
        "wings-no-router": Arm("Wings without router", "wings-no-router", lr="wings"),
    },
)

NEEDED = ("base", "wings")  # what the others are compared with


def chosen_arms(names: Sequence[str]) -> tuple[str, ...]:
    """Returns the arms of an experiment in their order: those named, and what they need.

    Raises:
        InputError: if there is no such arm.
    """
    found = {*NEEDED, *(name for name in names if ARMS[name])}
    if any(ARMS[name].merged for name in found):
        found.add("full")
    return tuple(name for name in ARMS if name in found)


# Over SmolLM2, whose own text skills are what may be forgotten.
SMOL = Plan(
    model="smol", test_scenes=12, val_scenes=4, align_steps=0, stage1_steps=10, stage2_steps=70,
    images=1, questions=10, shift_rows=24, wings_lr=1e-4, projector_lr=1e-4, earlier_turns=2,
    text_tokens=768, instructions=40,
)  # fmt: skip
PLANS: Registry[Plan] = Registry("model", {"tiny": Plan(), "smol": SMOL})


def quick(plan: Plan) -> Plan:
    """Returns a plan of a few steps, to see that it runs."""
    return replace(
        plan, seeds=(0, 1), train_scenes=6, val_scenes=1, test_scenes=2,
        align_steps=min(20, plan.align_steps), stage1_steps=1, stage2_steps=2, images=1, questions=4,
        patches=40, shift_rows=2, rank=4, alphas=(0.5,), text_tokens=min(64, plan.text_tokens),
        instructions=min(2, plan.instructions),
    )  # fmt: skip
