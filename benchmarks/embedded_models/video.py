"""Training the embedded video model: projector and language model on a frozen tower, resumable at any step.

Each step draws its movies and questions from its own number, so that a run that was stopped and goes
on from its last state draws what an undisturbed one does.
"""

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from vlm_prune.benchmarks.embedded_models.initial import prefer_times
from vlm_prune.benchmarks.embedded_models.language import (
    IGNORE,
    Packed,
    QuestionBlock,
    Row,
    attend_packed,
    pack,
    vision_transformer,
)
from vlm_prune.benchmarks.embedded_models.log import recorder
from vlm_prune.benchmarks.embedded_models.movies import (
    TIMES,
    MovieRow,
    PlotName,
    Sampling,
    Set,
    make_set,
    movie_row,
    video_row,
)
from vlm_prune.benchmarks.embedded_models.progress import TrainingProgress, answers_right
from vlm_prune.benchmarks.embedded_models.source import TRAIN_SEED, normalized
from vlm_prune.benchmarks.embedded_models.tower import optimizers, set_rate, tower_features
from vlm_prune.benchmarks.tasks import TASKS, VIDEO
from vlm_prune.benchmarks.tasks.moving import ACROSS
from vlm_prune.vlm.common.files import atomic_path
from vlm_prune.vlm.common.folder import record_settings
from vlm_prune.vlm.common.state import (
    load_tensors,
    optimizer_tensors,
    restore_moments,
    save_tensors,
    tensors_below,
)
from vlm_prune.vlm.tiny.video import WEIGHTS, trained_tensors, video_model

SAVE_EVERY = 180.0  # seconds
VALIDATE_EVERY = 1200.0
READ_LAYER = 3  # whose output tells the time, from 0
TIME_SHARE = 0.7  # of the loss on time, beside that of answers
STILL: tuple[PlotName, ...] = ("appears", "order", "event")


@dataclass(frozen=True)
class VideoLevel:
    """What rows of a stretch of training hold.

    Args:
        until: share of the time at which the level ends.
        sampling: tokens of a row.
        rows: how many of each plot a step has; those in one group are padded to the longest.
    """

    until: float
    sampling: Sampling
    rows: tuple[dict[PlotName, int], ...]


FIRST: tuple[dict[PlotName, int], ...] = (
    {"appears": 1, "order": 3}, {"middle": 2, "passes": 1, "event": 1}, {"direction": 2},
)  # fmt: skip
EVEN: tuple[dict[PlotName, int], ...] = (
    {"appears": 1, "order": 1}, {"event": 2}, {"middle": 2, "passes": 2}, {"direction": 2},
)  # fmt: skip
WHOLE: tuple[dict[PlotName, int], ...] = (
    {"appears": 1, "order": 1}, {"event": 1}, {"middle": 1, "passes": 1, "direction": 1},
)  # fmt: skip
VIDEO_LEVELS = (
    VideoLevel(0.5, Sampling(8, 0.7, lengths=(16,), contiguous=0.0), FIRST),
    VideoLevel(0.75, Sampling(40, 0.7, lengths=(16, 32)), EVEN),
    VideoLevel(0.88, Sampling(150, 0.6, lengths=(16, 64)), EVEN),
    VideoLevel(1.0, Sampling(250, 0.5, 0.4), WHOLE),
)


@dataclass(frozen=True)
class VideoRecipe:
    """Hyperparameters.

    Args:
        minutes: that training takes; curriculum and rate follow the time.
        rate: peak learning rate of the hidden matrices.
        sets: pictures with things, for each plot.
        decay: share of the time over which the rate falls.
        seed: of everything drawn.
        levels: of the curriculum.
    """

    minutes: float = 80.0
    rate: float = 1.2e-3
    sets: int = 64
    decay: float = 0.4
    seed: int = 0
    levels: tuple[VideoLevel, ...] = VIDEO_LEVELS


class VideoTrainer:
    """Trains projector and language model in a working folder, from its last state on.

    Args:
        folder: where state, log and results go.
        recipe: hyperparameters.
        keep: file of weights to start from, instead of those of `tiny`.
    """

    def __init__(self, folder: Path, recipe: VideoRecipe, keep: Path | None = None) -> None:
        self.folder, self.recipe = folder, recipe
        record_settings(folder / "recipe.json", asdict(recipe))
        torch.manual_seed(recipe.seed)
        self.model, self.processor = video_model()
        self.model.requires_grad_(False).eval()
        self.decoder = self.model.model.language_model.requires_grad_(True)
        self.projector = self.model.model.multi_modal_projector.requires_grad_(True)
        self.weights = trained_tensors(self.model)
        # read what tokens tell of time, so that what is asked is looked up as colors are
        self.heads = nn.Linear(self.decoder.config.hidden_size, sum(TIMES.values()))
        modules = [self.decoder, self.projector, self.heads]
        self.steppers = optimizers(modules, recipe.rate)
        self.states: list[Tensor] = []
        self.decoder.layers[READ_LAYER].register_forward_hook(self._note)
        attend_packed(self.decoder)
        self.sets: dict[tuple[str, int], Set] = {}
        self.clips: dict[str, tuple[Tensor, QuestionBlock]] = {}
        self.progress = TrainingProgress()
        if (folder / "state.safetensors").is_file():
            self._restore()
        elif keep is not None:
            self._load(load_tensors(keep))
        else:
            prefer_times(self.decoder)
        self.jitter = self._measure_jitter()

    @torch.no_grad()
    def encode(self, frame: NDArray[np.uint8]) -> Tensor:
        """Returns the tower's features of a frame by pooled token, (S, 4, width) in fp16."""
        return self._encode(frame[None])[0]

    def _encode(self, frames: NDArray[np.uint8]) -> Tensor:
        features = tower_features(vision_transformer(self.model), normalized(frames))
        # 2 x 2 patches are pooled into one token
        blocks = features.unflatten(1, (ACROSS, 2, ACROSS, 2)).transpose(2, 3)
        pooled: Tensor = blocks.reshape(len(frames), ACROSS * ACROSS, 4, -1).half()
        return pooled

    def _note(self, _: nn.Module, __: object, output: Tensor) -> None:
        self.states = [output]

    def _time_loss(self, rows: list[Row], batch: Packed) -> tuple[Tensor, dict[str, list[bool]]]:
        """Returns the mean cross-entropy of what tokens tell of time, and which of it is right."""
        shown = batch.ids == self.model.config.image_token_id
        logits = self.heads(self.states[0][shown])
        times = [row.times for row in rows if isinstance(row, MovieRow)]
        labels = torch.cat([told for told in times if told is not None])
        total, right = logits.new_zeros(()), dict[str, list[bool]]()
        for k, (name, scores) in enumerate(
            zip(TIMES, logits.split(list(TIMES.values()), -1), strict=True)
        ):
            told = labels[:, k] != IGNORE
            if told.any():
                total = total + nn.functional.cross_entropy(scores[told], labels[told, k])
                right[name] = (scores[told].argmax(-1) == labels[told, k]).tolist()
        return total, right

    def _measure_jitter(self) -> float:
        found = [make_set(np.random.default_rng(TRAIN_SEED), "appears") for _ in range(2)]
        found[1].seed += 1
        first, second = (each.shot((None,) * 3, self.encode).features.float() for each in found)
        return float((first - second).std() / 2**0.5)

    def set_of(self, plot: PlotName, number: int) -> Set:
        """Returns a training set, which is kept with its encoded frames.

        Args:
            plot: of its movies.
            number: below the recipe's.
        """
        key = ("still" if plot in STILL else plot, number)
        if key not in self.sets:
            rng = np.random.default_rng([TRAIN_SEED, 91, number, *key[0].encode()])
            self.sets[key] = make_set(rng, plot)
        return self.sets[key]

    def rows(self, rng: np.random.Generator, level: VideoLevel) -> list[list[Row]]:
        """Draws the rows of a step, by group."""
        return [
            [
                movie_row(
                    rng, plot, self.set_of(plot, int(rng.integers(self.recipe.sets))),
                    self.encode, level.sampling, self.jitter,
                )
                for plot, count in group.items()
                for _ in range(count)
            ]
            for group in level.rows
        ]  # fmt: skip

    def _answers(self, rows: list[Row]) -> tuple[Tensor, dict[str, list[bool]], Packed]:
        """Returns the sum of the cross-entropy of the answers' tokens, which answers are right, and
        the rows as they were read.

        An answer is right if argmax gives each of its tokens, the end's aside.
        """
        batch = pack(rows, self.processor.tokenizer, self.model.config.image_token_id)
        hidden_states = self.hidden_states(rows, batch)
        is_answer = batch.labels != IGNORE
        logits, labels = self.model.lm_head(hidden_states[is_answer]), batch.labels[is_answer]
        hits = logits.argmax(-1) == labels
        right = answers_right(batch.kinds, labels, hits, self.processor.tokenizer.eos_token_id)
        return nn.functional.cross_entropy(logits, labels, reduction="sum"), right, batch

    def hidden_states(self, rows: list[Row], batch: Packed) -> Tensor:
        """Returns the decoder's last hidden states, (B, L, width)."""
        pooled = []
        for row in rows:
            assert row.image is not None
            # the model projects patches, then pools them
            tokens = self.projector(row.image[:-1].flatten(0, 1)).unflatten(0, (-1, 4)).mean(1)
            pooled += [tokens, self.model.model.image_newline[None]]
        embeds = self.model.get_input_embeddings()(batch.ids)
        shown = (batch.ids == self.model.config.image_token_id).unsqueeze(-1)
        states: Tensor = self.decoder(
            inputs_embeds=embeds.masked_scatter(shown, torch.cat(pooled)),
            attention_mask=batch.mask, position_ids=batch.positions,
            use_cache=False, spans=batch.spans,
        ).last_hidden_state  # fmt: skip
        return states

    def done(self) -> float:
        """Returns the share of the training time that is over."""
        return self.progress.spent / (60 * self.recipe.minutes)

    def run(self, until: int | None = None) -> None:
        """Trains to the end, or to step `until`."""
        train, validation = (
            recorder(self.folder / "log.jsonl", stage) for stage in ("train", "validation")
        )
        saved = validated = time.monotonic()
        while self.done() < 1 and (until is None or self.progress.step < until):
            share = self.done()
            level = next(level for level in self.recipe.levels if share < level.until)
            rng = np.random.default_rng([TRAIN_SEED, self.recipe.seed, self.progress.step])
            begun = time.monotonic()
            figures = self._step(rng, level)
            self.progress.spent += time.monotonic() - begun
            if self.progress.step % 20 == 0:
                number = self.recipe.levels.index(level)
                train(self.progress.step, minutes=self.progress.spent / 60, level=number, **figures)
            self.progress.step += 1
            if time.monotonic() - saved > SAVE_EVERY:
                self.save()
                saved = time.monotonic()
            if time.monotonic() - validated > VALIDATE_EVERY:
                validation(self.progress.step, **self.validate())
                validated = time.monotonic()
        if self.done() >= 1:
            validation(self.progress.step, **self.validate())
        self.save()

    def _step(self, rng: np.random.Generator, level: VideoLevel) -> dict[str, float]:
        warm = min(1.0, (self.progress.step + 1) / 20)
        left = min(1.0, (1 - self.done()) / self.recipe.decay)
        for stepper, peak in zip(
            self.steppers, (self.recipe.rate, self.recipe.rate / 2), strict=True
        ):
            set_rate([stepper], peak * warm * max(0.03, left))
        groups = self.rows(rng, level)
        answers = sum(len(row.blocks) for rows in groups for row in rows)
        whole, right = 0.0, dict[str, list[bool]]()
        for rows in groups:
            loss, found, told = self._answers(rows)
            # an answer has its end and mostly one token more
            loss = loss / (2 * answers)
            times, timely = self._time_loss(rows, told)
            (loss + TIME_SHARE * times / len(groups)).backward()
            found |= timely
            whole += loss.item()
            for kind, hits in found.items():
                right.setdefault(kind, []).extend(hits)
        trained = [
            p for part in (self.decoder, self.projector, self.heads) for p in part.parameters()
        ]
        nn.utils.clip_grad_norm_(trained, 1.0)
        for stepper in self.steppers:
            stepper.step()
            stepper.zero_grad(set_to_none=True)
        self.progress.count(right, 0.02, 0.1)
        return {"loss": whole} | dict(sorted(self.progress.running.items()))

    @torch.no_grad()
    def validate(self, samples: int = 20) -> dict[str, float]:
        """Returns the share of right answers by task on validation videos with all tokens."""
        shares = {}
        for name in VIDEO:
            hits = []
            for k in range(samples if name != "event" else samples // 2):
                hits += self._answers([self.row_of(name, k)])[1][name]
            shares[name] = fmean(hits)
        return shares | {"mean": fmean(shares.values())}

    @torch.no_grad()
    def row_of(self, name: str, number: int) -> Row:
        """Returns the row of a validation sample of a task, with all tokens."""
        key = f"{name}/{number}"
        if key not in self.clips:
            sample = TASKS[name].sample(number, split="val")
            parts = np.split(sample.videos[0].frames, 4)
            prompt = f"{sample.turns[0].text} ASSISTANT:"
            block = QuestionBlock(prompt, f" {sample.answer}", name)
            self.clips[key] = torch.cat([self._encode(part) for part in parts]), block
        features, block = self.clips[key]
        tokens = features.flatten(0, 1).float()
        return video_row(tokens, [block], torch.arange(len(tokens)), len(tokens), False)

    def save(self) -> None:
        """Writes what a resumed training needs."""
        state: dict[str, Tensor] = {f"weights.{name}": t for name, t in self.weights.items()}
        state |= {f"heads.{name}": t for name, t in self.heads.state_dict().items()}
        state |= self.progress.tensors()
        for number, stepper in enumerate(self.steppers):
            state |= {f"moments{number}.{n}": t for n, t in optimizer_tensors(stepper).items()}
        with atomic_path(self.folder / "state.safetensors") as partial:
            save_tensors(partial, state)

    @torch.no_grad()
    def _restore(self) -> None:
        path = self.folder / "state.safetensors"
        state = load_tensors(path)
        self._load(tensors_below("weights.", state))
        self.heads.load_state_dict(tensors_below("heads.", state))
        for number, stepper in enumerate(self.steppers):
            restore_moments(path, stepper, tensors_below(f"moments{number}.", state))
        self.progress = TrainingProgress.read(state)

    @torch.no_grad()
    def _load(self, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            self.weights[name].copy_(tensor)

    def write_weights(self, folder: Path) -> None:
        """Writes projector and language model in fp16; the folder must exist."""
        save_tensors(folder / WEIGHTS, {name: t.half() for name, t in self.weights.items()})
