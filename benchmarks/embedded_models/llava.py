"""The embedded model's training, stage by stage, from any source of labeled images and questions.

Each stage leaves a file in the working folder and is skipped when that file is there, so a run
that was stopped goes on where it was.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from transformers import (
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from vlm_prune.benchmarks.embedded_models.initial import add_look_back, initialize_embeddings
from vlm_prune.benchmarks.embedded_models.language import (
    Lesson,
    Row,
    projected,
    train_language,
    vision_transformer,
)
from vlm_prune.benchmarks.embedded_models.log import Say, recorder
from vlm_prune.benchmarks.embedded_models.store import save_checkpoint
from vlm_prune.benchmarks.embedded_models.symbols import Symbols, align_projector, word_ids
from vlm_prune.benchmarks.embedded_models.tower import (
    PatchBatch,
    PatchHeads,
    tower_features,
    train_tower,
)
from vlm_prune.vlm.common.errors import naming
from vlm_prune.vlm.common.files import atomic_path
from vlm_prune.vlm.common.folder import OutputFolder, record_settings
from vlm_prune.vlm.common.state import writing

STAGES = ("tower", "reading", "symbols", "stories", "projector", "language", "practice")


class LabeledImage(Protocol):
    """One image: `pixels` (3, 336, 336); `triples` (576, 3) of name, color and place per patch."""

    @property
    def pixels(self) -> Tensor:
        """Returns the image as the tower takes it, (3, 336, 336)."""

    @property
    def triples(self) -> Tensor:
        """Returns name, color and token index of each patch, (576, 3)."""

    def row(self, image: Tensor, questions: int, lesson: Lesson, seed: int) -> Row:
        """Makes a training row of questions about the image.

        Args:
            image: what stands for it in the row: features (tokens, width) or symbols (tokens, 3).
            questions: how many.
            lesson: which kinds of question.
            seed: of the questions.
        """


class TrainingData(Protocol):
    """What the model learns from: labeled windows, images with questions, and text."""

    names: tuple[str, ...]
    colors: tuple[str, ...]

    def windows(self, batch: int, side: int, written: bool) -> Iterator[PatchBatch]:
        """Yields batches of image windows for the tower.

        Args:
            batch: windows per batch.
            side: patches per side of a window.
            written: whether they show digits and letters above all.
        """

    def whole(self, batch: int, part: int) -> Iterator[PatchBatch]:
        """Yields batches of `batch` whole images for the tower; another `part` has other images."""

    def examples(self, number: int, things: int | None) -> Sequence[LabeledImage]:
        """Returns `number` images with questions, of `things` objects each; None leaves it open."""

    def text(self, questions: int, seed: int) -> Row:
        """Makes a row of text-only `questions`, drawn by `seed`."""

    def prose(self, questions: int, seed: int) -> Row:
        """Makes a row of text for a model that sees nothing; `seed` draws its `questions`."""


@dataclass(frozen=True)
class LlavaRecipe:
    """Steps of each stage, and the number of scenes that the language model learns from.

    `bf16` runs the language model in mixed precision: up to twice as fast on a CPU that has bf16
    instructions (AMX, AVX512-BF16), many times slower on one that has none.
    """

    windows: int = 1600
    whole: int = 700
    written: int = 2000
    again: int = 200
    symbols: int = 2400
    stories: int = 400
    align: int = 400
    language: int = 2200
    practice: int = 900
    scenes: int = 4000
    seed: int = 0
    bf16: bool = False


class Trainer:
    """Runs the stages of a recipe on `model` in a working folder.

    Args:
        processor: the model's.
        source: what it learns from.
        folder: where stages, log and checkpoint go.
        recipe: steps of each stage.
        model: the embedded LLaVA, trained in place.
    """

    def __init__(
        self,
        processor: LlavaProcessor,
        source: TrainingData,
        folder: Path,
        recipe: LlavaRecipe,
        model: LlavaForConditionalGeneration,
    ) -> None:
        torch.manual_seed(recipe.seed)
        self.processor, self.source, self.folder, self.recipe = processor, source, folder, recipe
        self.model = model
        tokenizer = processor.tokenizer
        names, colors = (word_ids(tokenizer, words) for words in (source.names, source.colors))
        self.symbols = Symbols(self.model.get_input_embeddings(), names, colors, grid=24)
        width = self.model.config.vision_config.hidden_size
        self.heads = PatchHeads(width, len(names) + 1, len(colors), 24)
        self.parts = nn.ModuleList([self.model, self.symbols, self.heads])
        self.generator = torch.Generator().manual_seed(recipe.seed)
        self.few: list[list[LabeledImage]] = []
        self.many: list[LabeledImage] = []
        self.features: dict[int, Tensor] = {}

    def run(self, stages: tuple[str, ...] = STAGES) -> None:
        """Trains the stages that are not done yet; then writes the checkpoint.

        Raises:
            InputError: if the folder holds a training by another recipe or is being written to, or
                what a stage left is damaged.
        """
        with OutputFolder(self.folder):
            record_settings(self.folder / "recipe.json", asdict(self.recipe))
            self._run(stages)

    def _run(self, stages: tuple[str, ...]) -> None:
        for stage in stages:
            kept = self.folder / f"{stage}.safetensors"
            if kept.is_file():
                with naming(f"{kept} cannot be used; remove it, and the stage is done again"):
                    load_model(self.parts, kept)
                continue
            torch.manual_seed(self.recipe.seed)
            self.generator.manual_seed(self.recipe.seed + STAGES.index(stage))
            getattr(self, f"_{stage}")()
            with atomic_path(kept) as partial, writing(kept):
                save_model(self.parts, str(partial))
        save_checkpoint(self.model, self.processor, self.folder / "checkpoint")

    def say(self, stage: str) -> Say:
        """Returns what takes down the figures of a stage, in the folder's log."""
        return recorder(self.folder / "log.jsonl", stage)

    def _tower(self) -> None:
        """Trains the tower to name what patches show, on windows around
        objects, then on whole scenes.
        """
        tower, recipe = vision_transformer(self.model), self.recipe
        batches = self.source.windows(96, 6, written=False)
        drawn = [next(batches) for _ in range(18)]
        shown = torch.cat([_patches(batch.pixels)[batch.names.flatten() > 0] for batch in drawn])
        initialize_embeddings(tower, shown, self.generator)
        train_tower(tower, self.heads, batches, recipe.windows, 2e-3, self.say("windows"))
        whole = self.source.whole(12, 0)
        train_tower(tower, self.heads, whole, recipe.whole, 1.5e-3, self.say("whole"))

    def _reading(self) -> None:
        """Trains the tower on what is hardest: windows around handwriting
        and print, then whole scenes.
        """
        tower, recipe = vision_transformer(self.model), self.recipe
        batches = self.source.windows(128, 5, written=True)
        train_tower(tower, self.heads, batches, recipe.written, 1.5e-3, self.say("written"))
        whole = self.source.whole(12, 1)
        train_tower(tower, self.heads, whole, recipe.again, 1.5e-3, self.say("again"))

    def _symbols(self) -> None:
        """Trains the language model to answer from scenes written as symbols."""
        self._draw()
        modules: list[nn.Module] = [self.model.model.language_model, self.symbols]

        def encode(images: list[Tensor]) -> Tensor:
            tokens: Tensor = self.symbols(torch.cat(images))
            return tokens

        steps, rows = self.recipe.symbols, self._symbol_rows
        self._train("symbols", steps, 2e-3, encode, modules, rows, 5, freeze_first_layer=True)

    def _stories(self) -> None:
        """Trains text skills alone.

        The first layer is trained from here on, and a story's facts and the letters of options are
        found by name, as symbols are.
        """

        def rows(_: int) -> list[Row]:
            return [self.source.text(16, self._seed()) for _ in range(12)]

        add_look_back_for(self.source, self.model, self.processor)
        modules: list[nn.Module] = [self.model.model.language_model]
        self._train("stories", self.recipe.stories, 1e-3, torch.cat, modules, rows, 1)

    def _projector(self) -> None:
        """Fits the projector to the symbols."""
        self._draw()
        first = range(min(400, len(self.many)))
        triples = torch.cat([self.many[k].triples for k in first])
        features = torch.cat(self._encoded(first))
        with torch.no_grad():
            wanted = self.symbols(triples)
        projector, shown = self.model.model.multi_modal_projector, triples[:, 0] > 0
        steps, say = self.recipe.align, self.say("projector")
        align_projector(projector, features, wanted, shown, steps, say)

    def _language(self) -> None:
        """Trains projector and language model on the frozen tower, with up to
        200 tokens beside the objects'.
        """
        self._draw()
        inner = self.model.model
        modules: list[nn.Module] = [inner.language_model, inner.multi_modal_projector]

        levels: tuple[tuple[int, int, Lesson], ...] = (
            (12, 10, "finding"), (12, 10, "places"), (60, 12, "all"), (200, 18, "all"),
        )  # fmt: skip

        def rows(level: int) -> list[Row]:
            extra, written, lesson = levels[level]
            return self._rows(4, 32, extra, features=True, written=written, lesson=lesson)

        steps, encode = self.recipe.language, projected(self.model)
        self._train("language", steps, 1.5e-3, encode, modules, rows, len(levels))

    def _practice(self) -> None:
        """Trains on the tasks once more, counting most of all; all 576 tokens in the end."""
        self._draw()
        inner = self.model.model
        modules: list[nn.Module] = [inner.language_model, inner.multi_modal_projector]
        extras = (60, 200, 576)

        def rows(level: int) -> list[Row]:
            return self._rows(4, 32, extras[level], features=True, lesson="practice")

        steps, encode = self.recipe.practice, projected(self.model)
        self._train("practice", steps, 1.2e-3, encode, modules, rows, len(extras))

    def _train(
        self,
        stage: str,
        steps: int,
        rate: float,
        encode: Callable[[list[Tensor]], Tensor],
        modules: list[nn.Module],
        rows: Callable[[int], list[Row]],
        levels: int,
        *,
        freeze_first_layer: bool = False,
    ) -> None:
        """Trains the language model in one stage.

        Args:
            stage: its name.
            steps: of the optimizer.
            rate: the learning rate.
            encode: from images to their tokens.
            modules: that are trained.
            rows: the rows of a batch at a level.
            levels: how many the stage has.
            freeze_first_layer: keeps the language model's first layer as it is.
        """
        self.model.model.language_model.layers[0].requires_grad_(not freeze_first_layer)
        tokenizer, say = self.processor.tokenizer, self.say(stage)
        bf16 = self.recipe.bf16
        train_language(self.model, tokenizer, rows, steps, rate, encode, modules, say, levels, bf16)

    def _draw(self) -> None:
        if not self.many:
            self.many = list(self.source.examples(self.recipe.scenes, None))
            few = self.recipe.scenes // 8
            self.few = [list(self.source.examples(few, n)) for n in (2, 3, 4)]

    @torch.no_grad()
    def _encoded(self, scenes: Iterable[int]) -> list[Tensor]:
        """Returns the frozen tower's features of scenes, (576, width)
        each, kept in half precision.
        """
        missing = sorted({k for k in scenes if k not in self.features})
        for start in range(0, len(missing), 8):
            batch = missing[start : start + 8]
            pixels = torch.stack([self.many[k].pixels for k in batch])
            encoded = tower_features(vision_transformer(self.model), pixels).half()
            self.features |= dict(zip(batch, encoded, strict=True))
        return [self.features[k] for k in scenes]

    def _symbol_rows(self, level: int) -> list[Row]:
        """Returns lookups among two, three and four objects and in
        whole scenes; then every task.
        """
        if level < 4:
            pool = [*self.few, self.many][level]
            return self._rows(4, 12, 4, pool=pool, lesson="lookups")
        return self._rows(4, 16, 12)

    def _rows(
        self,
        images: int,
        questions: int,
        extra: int,
        *,
        features: bool = False,
        pool: list[LabeledImage] | None = None,
        lesson: Lesson = "all",
        written: int = 10,
    ) -> list[Row]:
        """Returns rows about `images` images and half as many of `written` questions about text.

        An image is given as the features or the symbols of all object patches and of `extra`
        others.

        Args:
            images: how many.
            questions: about each.
            extra: patches without an object that an image is given with.
            features: whether images are the tower's features, not symbols.
            pool: the images to draw from; all of them unless given.
            lesson: what is asked.
            written: questions of a row of text.
        """
        drawn = pool or self.many
        chosen = torch.randint(len(drawn), (images,), generator=self.generator).tolist()
        encoded = self._encoded(chosen) if features else []
        rows = []
        for number, k in enumerate(chosen):
            example = drawn[k]
            keep = _some(example.triples[:, 0] > 0, extra, self.generator)
            image = (encoded[number] if features else example.triples)[keep]
            rows.append(example.row(image, questions, lesson, self._seed()))
        texts = (self.source.text(written, self._seed()) for _ in range(images // 2))
        return [*rows, *texts]

    def _seed(self) -> int:
        return int(torch.randint(2**62, (), generator=self.generator))


def add_look_back_for(
    source: TrainingData, model: LlavaForConditionalGeneration, processor: LlavaProcessor
) -> None:
    """Lets the first layer, which looks back since `look_back`, carry the words that texts look up.

    Args:
        source: names the words.
        model: with a decoder after `look_back`; changed in place.
        processor: the model's.
    """
    words = word_ids(processor.tokenizer, [*source.names, *source.colors, *"ABCD"])
    add_look_back(model.model.language_model, words)


def _patches(pixels: Tensor, size: int = 14) -> Tensor:
    """Cuts images into patches, (B, 3, H, W) -> (B h w, 3 size size), in reading order."""
    cut = pixels.unfold(2, size, size).unfold(3, size, size)
    return cut.permute(0, 2, 3, 1, 4, 5).reshape(-1, 3 * size * size)


def _some(shown: Tensor, extra: int, generator: torch.Generator) -> Tensor:
    """Draws the indices of all shown patches and of `extra` others at most, in order."""
    rest = (~shown).nonzero()[:, 0]
    chosen = rest[torch.randperm(len(rest), generator=generator)[:extra]]
    return torch.cat([shown.nonzero()[:, 0], chosen]).sort().values
