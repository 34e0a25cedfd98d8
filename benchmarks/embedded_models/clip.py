"""Contrastive pre-training of the embedded CLIP on captions of what each domain lets it see.

A run lives in one folder and goes on where it was killed. Batches and shifts depend on the seed
and the step alone, so that a killed run ends where one without a break ends.
"""

import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import log_softmax, normalize, pad

from vlm_prune.benchmarks.embedded_models.initial import waves, whitened
from vlm_prune.benchmarks.embedded_models.log import append_figures
from vlm_prune.continual import checkpoint
from vlm_prune.continual.clip import extra
from vlm_prune.continual.streams.packaged import DOMAINS, PER_CLASS, Drawn
from vlm_prune.continual.tiny.config import WEIGHTS, write_clip_folder
from vlm_prune.kernels.dispatch import multiplies_bf16
from vlm_prune.vlm.common.errors import naming
from vlm_prune.vlm.common.files import atomic_path, output_folder
from vlm_prune.vlm.common.folder import OutputFolder, record_settings
from vlm_prune.vlm.common.state import (
    load_tensors,
    optimizer_tensors,
    restore_moments,
    save_tensors,
)

LOG = "log.jsonl"
STATE = "state.safetensors"


@dataclass(frozen=True)
class ClipRecipe:
    """Hyperparameters; `width` and `layers` are the vision tower's.

    `steps` is the length of the learning-rate schedule; training ends after `stop` of them, where
    the rate is at 8 % of its peak.
    """

    steps: int = 1800
    stop: int = 1500
    batch: int = 128
    rate: float = 1.5e-3
    warmup: int = 100
    weight_decay: float = 0.05
    shift: int = 3
    per_class: int = PER_CLASS["pretraining"]
    width: int = 128
    layers: int = 4
    seed: int = 0
    save_every: int = 100


@dataclass(frozen=True)
class Pairs:
    """Pictures (N, 48, 48, 3) uint8 and for each the numbers of its captions (N, templates)."""

    pixels: NDArray[np.uint8]
    captions: NDArray[np.int64]
    texts: tuple[str, ...]


def pairs(per_class: int) -> Pairs:
    """Draws the known classes of every domain in the plain style;
    every caption of a class in turn.
    """
    pixels, captions, texts = [], [], list[str]()
    for domain in DOMAINS.values():
        drawn = Drawn(domain, "pretraining", domain.known, "plain")
        # scenes are many and easy: a third of the pictures
        count = per_class // 3 if domain.name == "scenes" else per_class
        for index in range(count * len(domain.known)):
            image, label = drawn[index]
            pixels.append(np.asarray(image))
            first = len(texts) + label * len(domain.templates)
            captions.append([first + k for k in range(len(domain.templates))])
        texts += [t.format(name) for name in domain.known for t in domain.templates]
    return Pairs(np.stack(pixels), np.array(captions), tuple(texts))


def domain_prompts() -> list[str]:
    """Returns every prompt of every domain: the tokenizer may know
    words that the model never saw.
    """
    return [t.format(c) for d in DOMAINS.values() for c in d.classes for t in d.templates]


class Pretraining:
    """Trains a CLIP in a folder, or finishes a training there that was killed.

    Args:
        folder: where recipe, tokenizer, log, state and weights go.
        recipe: hyperparameters.
        data: pictures and captions; those of the packaged stream's domains by default.

    Raises:
        InputError: if the folder holds a training by another recipe, or a damaged state.
    """

    def __init__(self, folder: Path, recipe: ClipRecipe, data: Pairs | None = None) -> None:
        self.folder, self.recipe = folder, recipe
        output_folder(folder)
        record_settings(folder / "recipe.json", asdict(recipe))
        self.data = pairs(recipe.per_class) if data is None else data
        write_clip_folder(folder, domain_prompts(), recipe.width, recipe.layers)
        torch.manual_seed(recipe.seed)
        open_clip = extra("open_clip")
        self.model: Any = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
        tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
        mean, std = (
            self.model.visual.preprocess_cfg["mean"],
            self.model.visual.preprocess_cfg["std"],
        )
        self.mean, self.std = (torch.tensor(v).view(3, 1, 1) for v in (mean, std))
        self.tokens: Tensor = tokenizer(list(self.data.texts))
        decayed = [p for p in self.model.parameters() if p.ndim >= 2]
        others = [p for p in self.model.parameters() if p.ndim < 2]
        self.parameters = decayed + others
        self.optimizer = torch.optim.AdamW(
            [
                {"params": decayed, "weight_decay": recipe.weight_decay},
                {"params": others, "weight_decay": 0.0},
            ],
            lr=recipe.rate,
            betas=(0.9, 0.98),
        )
        self.done = 0
        if (folder / STATE).is_file():
            self._load()
        else:
            self._initialize()

    def run(self, until: int | None = None) -> None:
        """Trains to the end, or to step `until`; at the end the folder
        holds half-precision weights.

        Raises:
            InputError: if another training writes to the folder.
        """
        with OutputFolder(self.folder):
            self._run(until)

    def _run(self, until: int | None) -> None:
        recipe, begin = self.recipe, time.monotonic()
        for step in range(self.done, recipe.stop if until is None else until):
            loss, accuracy = self._step(step)
            if step % 20 == 0 or step == recipe.stop - 1:
                seconds = round(time.monotonic() - begin, 1)
                append_figures(
                    self.folder / LOG,
                    step=step,
                    seconds=seconds,
                    loss=loss,
                    batch_accuracy=accuracy,
                )
            self.done = step + 1
            if self.done % recipe.save_every == 0:
                self._save()
        if self.done == recipe.stop:
            half = {name: t.half() for name, t in self.model.state_dict().items()}
            with atomic_path(self.folder / WEIGHTS) as partial:
                save_tensors(partial, half)

    def _batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Returns normalized pixels (B, 3, 48, 48), each shifted a
        little, and their captions (B,).
        """
        rng = np.random.default_rng((self.recipe.seed, step))
        chosen = rng.integers(len(self.data.pixels), size=self.recipe.batch)
        template = rng.integers(self.data.captions.shape[1], size=self.recipe.batch)
        pixels = self.normalized(chosen)
        reach = self.recipe.shift
        wide = pad(pixels, (reach,) * 4, mode="replicate")
        side = pixels.shape[-1]
        corners = rng.integers(2 * reach + 1, size=(self.recipe.batch, 2)).tolist()
        shifted = [
            p[:, y : y + side, x : x + side] for p, (y, x) in zip(wide, corners, strict=True)
        ]
        return torch.stack(shifted), torch.from_numpy(self.data.captions[chosen, template])

    def normalized(self, chosen: NDArray[np.int64]) -> Tensor:
        """Returns the pictures at `chosen` as the model reads them, (B, 3, 48, 48)."""
        pixels = torch.from_numpy(self.data.pixels[chosen]).permute(0, 3, 1, 2).float() / 255
        return (pixels - self.mean) / self.std

    def _step(self, step: int) -> tuple[float, float]:
        pixels, captions = self._batch(step)
        texts, target = captions.unique(return_inverse=True)
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.rate * _schedule(step, self.recipe)
        self.model.train()
        bf16 = multiplies_bf16(torch.device("cpu"))
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            image = self.model.encode_image(pixels)
            text = self.model.encode_text(self.tokens[texts])
        scale = self.model.logit_scale.exp()
        logits = scale * normalize(image.float(), dim=-1) @ normalize(text.float(), dim=-1).T
        loss = contrastive(logits, target)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        with torch.no_grad():
            self.model.logit_scale.clamp_(0, math.log(100))
        return float(loss.detach()), float((logits.argmax(1) == target).float().mean())

    @torch.no_grad()
    def _initialize(self) -> None:
        """Sets patch filters to whitened components, and positions to waves, as in `vlm.tiny`."""
        visual = self.model.visual
        generator = torch.Generator().manual_seed(self.recipe.seed)
        rng = np.random.default_rng(self.recipe.seed)
        some = self.normalized(rng.integers(len(self.data.pixels), size=600))
        size = visual.conv1.kernel_size[0]
        cut = some.unfold(2, size, size).unfold(3, size, size).permute(0, 2, 3, 1, 4, 5).flatten(3)
        patches = cut.flatten(0, 2)
        patches = patches[patches.std(-1) > 0.3]
        kernel = visual.conv1.weight
        kernel.copy_(0.5 * whitened(patches, len(kernel), generator).reshape(kernel.shape))
        table = visual.positional_embedding
        table[1:] = 0.4 * waves(table.shape[1], visual.grid_size[0])

    def _save(self) -> None:
        """Writes model and moments of every parameter beside the last
        state, and renames the file.
        """
        state = {f"model.{name}": t for name, t in self.model.state_dict().items()}
        moments = optimizer_tensors(self.optimizer)
        state |= {f"optimizer.{name}": tensor for name, tensor in moments.items()}
        with atomic_path(self.folder / STATE) as partial:
            save_tensors(partial, state | {"step": torch.tensor(self.done)})

    def _load(self) -> None:
        path = self.folder / STATE
        state = load_tensors(path)
        with naming(f"{path} cannot be used; remove it"):
            parts: dict[str, dict[str, Tensor]] = {"model": {}, "optimizer": {}, "step": {}}
            for name, tensor in state.items():
                part, _, rest = name.partition(".")
                parts[part][rest] = tensor
            self.done = int(state["step"])
            self.model.load_state_dict(parts["model"])
            restore_moments(path, self.optimizer, parts["optimizer"])
        checkpoint.cut_log(self.folder / LOG, lambda line: line["step"] < self.done)


def contrastive(logits: Tensor, target: Tensor) -> Tensor:
    """Returns CLIP's two-way loss where several pictures may share a caption.

    Args:
        logits: (B, C) of pictures against the batch's distinct captions.
        target: (B,) the caption of each picture; a caption's pictures share its target evenly.
    """
    rows = torch.arange(len(target))
    to_text = -log_softmax(logits, 1)[rows, target].mean()
    counts = target.bincount(minlength=logits.shape[1])
    to_image = -(log_softmax(logits, 0)[rows, target] / counts[target]).sum() / logits.shape[1]
    return (to_text + to_image) / 2


def _schedule(step: int, recipe: ClipRecipe) -> float:
    """Returns the factor of the rate at a step: a linear warm-up, then a cosine to zero."""
    if step < recipe.warmup:
        return (step + 1) / recipe.warmup
    share = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    return 0.5 * (1 + math.cos(math.pi * share))
