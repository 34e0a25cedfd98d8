"""DoRA: low-rank updates of direction, with a trained magnitude per row."""

from dataclasses import dataclass
from typing import Any, ClassVar

from vlm_prune.continual.methods.peft_adapter import PeftAdapter


@dataclass
class DoRA(PeftAdapter):
    """peft's LoRA with `use_dora`, scale 1.

    https://arxiv.org/abs/2402.09353
    """

    name: ClassVar[str] = "dora"

    def config(self, peft: Any, targets: str, names: list[str]) -> Any:
        return peft.LoraConfig(
            r=self.rank, lora_alpha=self.rank, target_modules=targets, use_dora=True
        )
