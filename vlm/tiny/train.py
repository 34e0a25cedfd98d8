"""The embedded model's training, stage by stage, from any source of labelled images and questions.

Each stage leaves a file in the working folder and is skipped when that file is there, so a run
that was stopped goes on where it was.
"""

import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from vlm_prune.vlm.tiny.config import make_model
from vlm_prune.vlm.tiny.initial import initialise_embeddings
from vlm_prune.vlm.tiny.language import Row, clip, projected, train_language
from vlm_prune.vlm.tiny.store import save_checkpoint
from vlm_prune.vlm.tiny.symbols import Symbols, align_projector, word_ids
from vlm_prune.vlm.tiny.tower import PatchBatch, PatchHeads, tower_features, train_tower

logger = logging.getLogger(__name__)
STAGES = ("tower", "symbols", "subset", "full")


class Example(Protocol):
    """One image: `pixels` (3, 336, 336); `triples` (576, 3) of name, colour and place per patch."""

    @property
    def pixels(self) -> Tensor: ...
    @property
    def triples(self) -> Tensor: ...
    def row(self, image: Tensor, questions: int, lookups: bool) -> Row: ...


class Source(Protocol):
    """What the model learns from: labelled windows, images with questions, and text."""

    names: tuple[str, ...]
    colors: tuple[str, ...]

    def windows(self, batch: int, side: int) -> Iterator[PatchBatch]: ...
    def examples(self, number: int, things: int | None) -> list[Example]: ...
    def text(self, questions: int) -> Row: ...


@dataclass(frozen=True)
class Recipe:
    """How long each stage lasts (tower in steps, the others in seconds), sizes and rates."""

    tower_steps: int = 1000
    symbols_seconds: float = 280
    subset_seconds: float = 400
    full_seconds: float = 220
    images: int = 800
    seed: int = 0


class Trainer:
    """Runs the stages of a recipe in a working folder."""

    def __init__(
        self, processor: LlavaProcessor, source: Source, folder: Path, recipe: Recipe
    ) -> None:
        torch.manual_seed(recipe.seed)
        self.processor, self.source, self.folder, self.recipe = processor, source, folder, recipe
        self.model: LlavaForConditionalGeneration = make_model(processor)
        tokenizer = processor.tokenizer
        names, colors = (word_ids(tokenizer, words) for words in (source.names, source.colors))
        self.symbols = Symbols(self.model.get_input_embeddings(), names, colors, grid=24)
        self.parts = nn.ModuleList([self.model, self.symbols])
        self.generator = torch.Generator().manual_seed(recipe.seed)
        self.few: list[Example] = []
        self.many: list[Example] = []
        self.features: list[Tensor] = []
        folder.mkdir(parents=True, exist_ok=True)

    def run(self, stages: tuple[str, ...] = STAGES) -> None:
        """Do the stages that are not done yet; then write the checkpoint."""
        for stage in stages:
            kept = self.folder / f"{stage}.safetensors"
            if kept.is_file():
                load_model(self.parts, kept)
                continue
            done: dict[str, float] = getattr(self, f"_{stage}")()
            save_model(self.parts, str(kept))
            line = {"stage": stage, **done, "recipe": asdict(self.recipe)}
            with (self.folder / "log.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")
        save_checkpoint(self.model, self.processor, self.folder / "checkpoint")

    def _tower(self) -> dict[str, float]:
        tower = clip(self.model)
        heads = PatchHeads(192, len(self.source.names) + 1, len(self.source.colors), 24)
        batches = self.source.windows(80, 6)
        drawn = [next(batches) for _ in range(20)]
        shown = torch.cat([_patches(batch.pixels)[batch.names.flatten() > 0] for batch in drawn])
        initialise_embeddings(tower, shown, self.generator)
        return train_tower(tower, heads, batches, self.recipe.tower_steps, 2e-3)

    def _symbols(self) -> dict[str, float]:
        self._draw()
        language = self.model.model.language_model

        def encode(images: list[Tensor]) -> Tensor:
            tokens: Tensor = self.symbols(torch.cat(images))
            return tokens

        seconds = self.recipe.symbols_seconds
        return self._language(
            seconds, 3e-3, encode, [language, self.symbols], self._symbol_rows, levels=3
        )

    def _subset(self) -> dict[str, float]:
        self._draw()
        self._encode()
        triples = torch.cat([example.triples for example in self.many])
        with torch.no_grad():
            targets = self.symbols(triples)
        projector = self.model.model.multi_modal_projector
        align_projector(projector, torch.cat(self.features), targets, triples[:, 0] > 0, 250)
        rows = partial(self._rows, 8, 16, 96, features=True)
        return self._answers(self.recipe.subset_seconds, 1.5e-3, lambda _: rows())

    def _full(self) -> dict[str, float]:
        self._draw()
        self._encode()
        rows = partial(self._rows, 4, 20, 576, features=True)
        return self._answers(self.recipe.full_seconds, 1e-3, lambda _: rows())

    def _answers(
        self, seconds: float, rate: float, rows: Callable[[int], list[Row]]
    ) -> dict[str, float]:
        inner = self.model.model
        modules = [inner.language_model, inner.multi_modal_projector]
        return self._language(seconds, rate, projected(self.model), modules, rows)

    def _language(
        self,
        seconds: float,
        rate: float,
        encode: Callable[[list[Tensor]], Tensor],
        modules: list[nn.Module],
        rows: Callable[[int], list[Row]],
        levels: int = 1,
    ) -> dict[str, float]:
        tokenizer = self.processor.tokenizer
        return train_language(self.model, tokenizer, rows, seconds, rate, encode, modules, levels)

    def _draw(self) -> None:
        if not self.many:
            self.many = self.source.examples(self.recipe.images, None)
            self.few = self.source.examples(self.recipe.images // 3, 2)

    @torch.no_grad()
    def _encode(self) -> None:
        """Cache the frozen tower's features, (576, width) in half precision per image."""
        if self.features:
            return
        for start in range(0, len(self.many), 8):
            pixels = torch.stack([example.pixels for example in self.many[start : start + 8]])
            self.features += list(tower_features(clip(self.model), pixels).half())

    def _symbol_rows(self, level: int) -> list[Row]:
        """Two objects and lookups only; then whole scenes; then every task, with more background."""
        if level < 2:
            pool = self.many if level else self.few
            return self._rows(4, 10, 4 * level, features=False, pool=pool, lookups=True)
        return self._rows(6, 14, 12, features=False)

    def _rows(
        self,
        images: int,
        questions: int,
        extra: int,
        *,
        features: bool,
        pool: list[Example] | None = None,
        lookups: bool = False,
    ) -> list[Row]:
        """Rows about `images` images, with all object patches and `extra` others, and one of text."""
        rows = []
        for _ in range(images):
            drawn = pool or self.many
            k = int(torch.randint(len(drawn), (), generator=self.generator))
            triples = drawn[k].triples
            keep = _some(triples[:, 0] > 0, extra, self.generator)
            source = self.features[k] if features else triples
            rows.append(drawn[k].row(source[keep], questions, lookups))
        return [*rows, self.source.text(questions)]


def _patches(pixels: Tensor, size: int = 14) -> Tensor:
    """(B, 3, H, W) -> (B h w, 3 size size), in reading order."""
    cut = pixels.unfold(2, size, size).unfold(3, size, size)
    return cut.permute(0, 2, 3, 1, 4, 5).reshape(-1, 3 * size * size)


def _some(shown: Tensor, extra: int, generator: torch.Generator) -> Tensor:
    """Indices of all shown patches and of `extra` others at most, in order."""
    rest = (~shown).nonzero()[:, 0]
    chosen = rest[torch.randperm(len(rest), generator=generator)[:extra]]
    return torch.cat([shown.nonzero()[:, 0], chosen]).sort().values
