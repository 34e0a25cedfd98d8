"""Adapters of the peft library in the same loop, with a check that they did something."""

import re
import warnings
from abc import abstractmethod
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vlm_prune.continual.attention import fuse, split
from vlm_prune.continual.clip import extra
from vlm_prune.continual.config import Placement, above
from vlm_prune.continual.delta import Delta
from vlm_prune.continual.methods.base import Context, Method, ParameterGroup
from vlm_prune.continual.model import placed_sites
from vlm_prune.vlm.common.errors import InputError


@dataclass
class PeftAdapter(Method):
    """Base of the methods whose layers come from peft; merged after every task.

    Args:
        rank: peft's r.
        placement: the sites.
    """

    rank: int = 16
    placement: Placement = field(default_factory=Placement)
    _wrapper: Any = field(default=None, init=False, repr=False)
    _before: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        above("rank", self.rank, 1)

    @abstractmethod
    def config(self, peft: Any, targets: str, names: list[str]) -> Any:
        """Returns peft's configuration for the method.

        Args:
            peft: the library.
            targets: pattern that matches the sites.
            names: the sites.
        """

    def begin_task(self, context: Context) -> list[ParameterGroup]:
        self.start(context)
        peft, model = extra("peft"), context.clip.model
        split(model)
        try:
            names = list(placed_sites(context.clip, self.placement))
            # peft matches a list of names by their endings: a text site would match vision's too
            settings = self.config(peft, "|".join(re.escape(name) for name in names), names)
        except InputError:
            fuse(model)
            raise
        model.requires_grad_(False)
        self._before = {n: model.get_submodule(n).weight.detach().cpu().clone() for n in names}
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            # peft warns that a model that is not from transformers has no config
            warnings.simplefilter("ignore")
            torch.manual_seed(context.generator(0).initial_seed())
            self._wrapper = peft.get_peft_model(model, settings)
        adapted = set(self._wrapper.base_model.targeted_module_names)
        if adapted != set(names):
            raise InputError(f"peft adapted {len(adapted)} of {len(names)} sites for {self.name}")
        return [{"params": list(self.trained().values()), "lr": context.recipe.lr}]

    def adapters(self) -> dict[str, torch.nn.Parameter]:
        return self.trained()

    def trained(self) -> dict[str, torch.nn.Parameter]:
        return {n: p for n, p in self.context.clip.model.named_parameters() if p.requires_grad}

    def end_task(self) -> Delta | None:
        """Merges the adapter into the model.

        Raises:
            InputError: if no weight changed, which means that the adapter was never trained.
        """
        model = self.context.clip.model
        self._wrapper.merge_and_unload()
        if hasattr(model, "peft_config"):
            del model.peft_config
        self._wrapper = None
        after = {n: model.get_submodule(n).weight.detach().cpu() for n in self._before}
        same = all(torch.equal(after[name], weight) for name, weight in self._before.items())
        self._before = {}
        fuse(model)
        model.requires_grad_(False)
        if same:
            raise InputError(
                f"{self.name} changed no weight in task {self.context.number}; "
                "give a higher lr or more steps"
            )
        return None
