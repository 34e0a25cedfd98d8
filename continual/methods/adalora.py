"""AdaLoRA: a shared rank budget, spent by a score of each singular triplet."""

from dataclasses import InitVar, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from vlm_prune.continual.config import above, within
from vlm_prune.continual.delta import Delta
from vlm_prune.continual.methods.peft_adapter import PeftAdapter
from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.common.renamed import warn_renamed

STATISTICS = ("ipt", "exp_avg_ipt", "exp_avg_unc")


@dataclass
class AdaLoRA(PeftAdapter):
    """peft's AdaLoRA, with the two steps that its users must take themselves.

    https://arxiv.org/abs/2303.10512

    Without `update_and_allocate` after every step it is plain LoRA, and its orthogonality term is
    added only to outputs that have a loss, which a CLIP's have not. Both are done here, and a task
    that ends above the budget is an error.

    Args:
        rank: components per site at the start.
        target_rank: mean components per site at the end.
        orthogonality: weight of the mean of |P'P - I| and |QQ' - I|.
        warmup: share of the steps before the budget falls.
        final: share of the steps after it has fallen.
        interval: steps between two allocations; `every` is its name of before.
    """

    name: ClassVar[str] = "adalora"
    target_rank: int = 8
    orthogonality: float = 0.5
    warmup: float = 0.1
    final: float = 0.3
    interval: int = 10
    every: InitVar[int | None] = None

    def __post_init__(self, every: int | None) -> None:
        super().__post_init__()
        if every is not None:
            warn_renamed("adalora's option every", "interval")
            self.interval = every
        within("target_rank", self.target_rank, 1, self.rank - 1)
        above("orthogonality", self.orthogonality, 0)
        within("warmup", self.warmup)
        within("final", self.final, 0, 1 - self.warmup)
        above("interval", self.interval, 1)

    def config(self, peft: Any, targets: str, names: list[str]) -> Any:
        steps = self.context.recipe.steps
        first, last = int(self.warmup * steps), int(self.final * steps)
        if first >= steps - last - 1:
            raise InputError(f"steps {steps} is too few for adalora; give more")
        return peft.AdaLoraConfig(
            init_r=self.rank,
            target_r=self.target_rank,
            tinit=first,
            tfinal=max(1, last),
            deltaT=self.interval,
            total_step=steps,
            lora_alpha=self.rank,
            orth_reg_weight=self.orthogonality,
            target_modules=targets,
        )

    def loss(self, pixels: Tensor, labels: Tensor, step: int) -> Tensor:
        loss = super().loss(pixels, labels, step)
        gaps = []
        for name, matrix in self.trained().items():
            if "lora_A" in name or "lora_B" in name:
                square = matrix @ matrix.T if "lora_A" in name else matrix.T @ matrix
                gaps.append((square - torch.eye(len(square), device=square.device)).norm())
        return loss + self.orthogonality * torch.stack(gaps).mean()

    def after_step(self, step: int) -> None:
        self._wrapper.base_model.update_and_allocate(step)

    def left(self) -> int:
        """Returns how many components have a singular value that is not 0."""
        values = [p for n, p in self.trained().items() if "lora_E" in n]
        return int(sum(v.count_nonzero() for v in values))

    def end_task(self) -> Delta | None:
        """Merges the adapter into the model.

        Raises:
            InputError: if more components are left than the budget allows.
        """
        left, budget = self.left(), self.target_rank * len(self._before)
        if left > budget:
            raise InputError(
                f"adalora ended with {left} components, above its budget of {budget}: "
                "its allocation did not run at every step"
            )
        return super().end_task()

    def state(self) -> dict[str, Tensor]:
        if self._wrapper is None:
            return {}
        base = self._wrapper.base_model
        kinds = {kind: getattr(base.rankallocator, kind) for kind in STATISTICS}
        pattern = base.peft_config[base.trainable_adapter_name].rank_pattern or {}
        kinds["pattern"] = {n: torch.tensor(kept).to(torch.uint8) for n, kept in pattern.items()}
        return {f"{kind}|{n}": t for kind, tensors in kinds.items() for n, t in tensors.items()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        if self._wrapper is None:
            return
        base, device, pattern = self._wrapper.base_model, self.context.clip.device, {}
        for key, tensor in state.items():
            kind, _, name = key.partition("|")
            if kind == "pattern":
                pattern[name] = tensor.bool().tolist()
            elif kind in STATISTICS:
                getattr(base.rankallocator, kind)[name] = tensor.to(device)
        base.peft_config[base.trainable_adapter_name].rank_pattern = pattern or None
