"""Training the embedded LLaVA over SmolLM2: projector and LoRA on a frozen tower, resumable at any step.

Each step draws its scenes and questions from its own number, so that a run that was stopped and goes
on from its last state draws what an undisturbed one does.
"""

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from vlm_prune.benchmarks.embedded_models.base_text import instructions, package_text
from vlm_prune.benchmarks.embedded_models.curriculum import (
    ChatFormat,
    Maker,
    listed,
    name_letter,
    pair,
    side,
    what,
    where,
)
from vlm_prune.benchmarks.embedded_models.language import (
    IGNORE,
    Packed,
    QuestionBlock,
    Row,
    pack,
    vision_transformer,
)
from vlm_prune.benchmarks.embedded_models.log import recorder
from vlm_prune.benchmarks.embedded_models.own_instructions import (
    answer,
    without,
    write_instructions,
)
from vlm_prune.benchmarks.embedded_models.progress import TrainingProgress, answers_right
from vlm_prune.benchmarks.embedded_models.source import TRAIN_SEED, pixels_of
from vlm_prune.benchmarks.embedded_models.symbols import Symbols, align_projector, word_ids
from vlm_prune.benchmarks.embedded_models.tower import tower_features
from vlm_prune.benchmarks.tasks import (
    attribute,
    choice,
    count,
    exist,
    hallucination,
    ocr,
    relation,
)
from vlm_prune.benchmarks.tasks import text as text_task
from vlm_prune.benchmarks.tasks.base import Question, Split
from vlm_prune.benchmarks.tasks.scenes import COLORS, GRID, NAMES, Scene, make_scene
from vlm_prune.kernels.dispatch import multiplies_bf16
from vlm_prune.vlm.common.files import atomic_path
from vlm_prune.vlm.common.folder import record_settings
from vlm_prune.vlm.common.state import (
    load_tensors,
    optimizer_tensors,
    restore_moments,
    save_tensors,
    tensors_below,
)
from vlm_prune.vlm.load import load
from vlm_prune.vlm.smol import PROJECTOR
from vlm_prune.vlm.smol.base import language_folder, load_base
from vlm_prune.vlm.smol.config import llava_over, smol_processor


class LowRankLinear(torch.autograd.Function):
    """`x W' + x A' B'` with a frozen `W`, all in one type: half the passes over memory of separate ones."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """Returns the layer's output, (..., out).

        Args:
            ctx: keeps what `backward` reads.
            x: inputs, (..., in).
            weight: the frozen matrix, (out, in).
            a: trained, (rank, in).
            b: trained, (out, rank).
        """
        flat = x.flatten(0, -2)
        low = flat @ a.T
        ctx.save_for_backward(flat, low, weight, a, b)
        return (flat @ weight.T).addmm_(low, b.T).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Returns the gradients of `x`, `a` and `b`; the weight is frozen."""
        flat, low, weight, a, b = ctx.saved_tensors
        wide = grad.flatten(0, -2)
        narrow = wide @ b
        back = (wide @ weight).addmm_(narrow, a).view(*grad.shape[:-1], -1)
        return back, None, narrow.T @ flat, wide.T @ low


def fuse_lora(layer: Any) -> None:
    """Makes a PEFT layer of scale 1 compute by `LowRankLinear`."""
    base, a, b = layer.base_layer, layer.lora_A["default"], layer.lora_B["default"]

    def forward(x: Tensor) -> Tensor:
        if layer.disable_adapters:
            plain: Tensor = base(x)
            return plain
        out: Tensor = LowRankLinear.apply(x, base.weight, a.weight, b.weight)
        return out

    layer.forward = forward


SAVE_SECONDS = 180
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TASKS: dict[str, Maker] = {
    "exist": exist.ask, "attribute": attribute.ask, "ocr": ocr.ask, "count": count.ask,
    "relation": relation.ask, "choice": choice.ask,
}  # fmt: skip


MAKERS: dict[str, Maker] = TASKS | {
    "where": where, "pair": pair, "side": side, "what": what, "letter": name_letter,
    "listed": listed, "describe": hallucination.describe,
}  # fmt: skip


@dataclass(frozen=True)
class Level:
    """What rows of a stretch of training hold.

    Args:
        until: share of the steps at which the level ends.
        things: objects of each scene, from and to; None as the tasks have them.
        extra: background tokens beside those of objects, at most; None for all.
        questions: of each row.
        shares: how often each kind of question is drawn.
        whole: share of the steps that see one image with all of its tokens instead.
    """

    until: float
    things: tuple[int, int] | None
    extra: int | None
    questions: int
    shares: dict[str, int]
    whole: float = 0.0


LEVELS = (
    Level(0.08, (2, 3), 6, 40, {"pair": 10, "attribute": 2, "ocr": 2}),
    Level(
        0.21, None, 12, 30, {"pair": 8, "attribute": 3, "ocr": 2, "what": 2, "where": 3, "exist": 1}
    ),
    Level(
        0.5, None, 40, 18,
        {"pair": 2, "attribute": 1, "ocr": 3, "where": 3, "exist": 4, "side": 4, "relation": 2,
         "count": 3, "choice": 2, "letter": 2},
    ),
    Level(
        0.9, None, 80, 18,
        {"attribute": 1, "ocr": 3, "where": 1, "exist": 3, "side": 2, "relation": 4, "count": 4,
         "choice": 3, "letter": 1},
    ),
    Level(
        1.0, None, None, 14,
        {"attribute": 1, "ocr": 3, "exist": 3, "relation": 4, "count": 4, "choice": 2},
    ),
)  # fmt: skip
# Those of a training that starts from weights that see already.
FURTHER = (
    Level(
        0.3, None, 40, 20,
        {"where": 4, "side": 3, "relation": 3, "listed": 4, "count": 3, "describe": 1, "exist": 2,
         "ocr": 2, "attribute": 1, "choice": 1},
        whole=0.1,
    ),
    Level(
        0.65, None, 100, 20,
        {"where": 2, "side": 2, "relation": 5, "listed": 3, "count": 4, "describe": 1, "exist": 2,
         "ocr": 2, "attribute": 1, "choice": 2},
        whole=0.25,
    ),
    Level(
        1.0, None, 160, 20,
        {"side": 1, "relation": 5, "listed": 2, "count": 4, "describe": 1, "exist": 2, "ocr": 2,
         "attribute": 1, "choice": 2},
        whole=0.6,
    ),
)  # fmt: skip


@dataclass(frozen=True)
class SmolRecipe:
    """Hyperparameters.

    Args:
        steps: of the optimizer.
        minutes: that training takes; where given, it ends then, and curriculum and rates follow the time.
        levels: of the curriculum.
        rank: of LoRA.
        rate: peak learning rate of LoRA.
        projector_rate: peak learning rate of the projector.
        images: rows with an image at each step.
        scenes: different training scenes.
        fit_scenes: those that the projector is first fitted on.
        fit_steps: of that.
        own: instructions that SmolLM2 writes itself.
        text_rows: conversations in a step.
        text_weight: of the divergence from SmolLM2's own distribution, beside the answers' loss.
        decay: share of the steps over which the rates fall.
        seed: of everything drawn.
    """

    steps: int = 1400
    minutes: float | None = None
    levels: tuple[Level, ...] = LEVELS
    rank: int = 16
    rate: float = 1e-3
    projector_rate: float = 3e-4
    images: int = 2
    scenes: int = 3000
    fit_scenes: int = 300
    fit_steps: int = 600
    own: int = 96
    text_rows: int = 5
    text_weight: float = 10.0
    decay: float = 0.35
    seed: int = 0


@dataclass
class EncodedScene:
    """A scene without its pixels, and the frozen tower's features of it, (576, width) in fp16."""

    scene: Scene
    features: Tensor


class SmolTrainer:
    """Trains projector and LoRA in a working folder, from its last state on.

    Args:
        folder: where state, log and results go.
        recipe: hyperparameters.
        keep: folder of an adapter and a projector to start from.

    Raises:
        InputError: if the folder holds a training by another recipe; steps and minutes may grow.
    """

    def __init__(self, folder: Path, recipe: SmolRecipe, keep: Path | None = None) -> None:
        self.folder, self.recipe = folder, recipe
        ends = ("steps", "minutes")
        settings = {name: value for name, value in asdict(recipe).items() if name not in ends}
        record_settings(folder / "recipe.json", settings)
        torch.manual_seed(recipe.seed)
        language, _ = load_base()
        tiny, _ = load("tiny", "cpu")
        self.processor = smol_processor(language_folder())
        self.tokenizer = self.processor.tokenizer
        self.model = llava_over(language, self.processor, tiny.model.vision_tower)
        self.model.requires_grad_(False).eval()
        self.decoder = self.model.model.language_model
        self.projector = self.model.model.multi_modal_projector.requires_grad_(True)
        # A CPU without matrix units for bfloat16 takes many times as long for it as for fp32,
        # where the fused attention is the faster one.
        amx = multiplies_bf16(torch.device("cpu"))
        self.dtype = torch.bfloat16 if amx else torch.float32
        self.decoder.set_attn_implementation("eager" if amx else "sdpa")
        self._inject()
        self.optimizer = torch.optim.AdamW(
            [
                {"params": list(self.lora.values()), "peak": recipe.rate},
                {"params": list(self.projector.parameters()), "peak": recipe.projector_rate},
            ],
            weight_decay=0.0,
            betas=(0.9, 0.98),
        )
        self.head = self.model.lm_head.weight.detach().to(self.dtype)
        self.chat = ChatFormat.of(self.processor)
        self.encoded: dict[tuple[Any, ...], EncodedScene] = {}
        self.progress = TrainingProgress()
        if (folder / "state.safetensors").is_file():
            self._restore()
        elif keep is not None:
            self._read_adapter(keep)
        else:
            self._fit_projector()
        self.conversations, self.plain = self._texts()
        self.own_states: dict[int, Tensor] = {}

    def _inject(self) -> None:
        rank = self.recipe.rank
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=LINEAR)
        inject_adapter_in_model(config, self.decoder)
        self.words = nn.Embedding.from_pretrained(self.model.get_input_embeddings().weight.detach())
        self.live = {n: p for n, p in self.decoder.named_parameters() if "lora_" in n}
        self.lora = {n: nn.Parameter(p.detach().float()) for n, p in self.live.items()}
        self.decoder.layers.to(self.dtype)
        self.decoder.norm.to(self.dtype)
        for module in self.decoder.modules():
            if isinstance(module, BaseTunerLayer):
                fuse_lora(module)
        self.adapters(True)

    def adapters(self, on: bool) -> None:
        """Turns LoRA on or off; off, the language model is SmolLM2 itself."""
        for module in self.decoder.modules():
            if isinstance(module, BaseTunerLayer):
                module.enable_adapters(on)
        for parameter in self.live.values():
            parameter.requires_grad_(True)

    @torch.no_grad()
    def _copy_master(self) -> None:
        """Gives the decoder its LoRA weights in its own type; the optimizer has those in fp32."""
        for name, parameter in self.live.items():
            parameter.copy_(self.lora[name])

    def _chat(self, question: str, answer: str | None = None) -> str:
        messages = [{"role": "user", "content": question}]
        if answer is not None:
            messages.append({"role": "assistant", "content": answer})
        text: str = self.processor.apply_chat_template(
            messages, add_generation_prompt=answer is None
        )
        return text

    def _fit_projector(self) -> None:
        """Fits the projector to sums of word embeddings: what a patch shows, its color, its place."""
        words = self.model.get_input_embeddings()
        names, colors = word_ids(self.tokenizer, NAMES), word_ids(self.tokenizer, list(COLORS))
        symbols = Symbols(words, names, colors, GRID)
        left, right, above, below = words.weight[
            word_ids(self.tokenizer, ["left", "right", "above", "below"])
        ].unbind(0)
        line = torch.linspace(-1, 1, GRID)[:, None]
        with torch.no_grad():
            symbols.columns.add_(line * (right - left) / 2)
            symbols.rows.add_(line * (below - above) / 2)
            scenes = [self.scene("train", k, None) for k in range(self.recipe.fit_scenes)]
            features = torch.cat([s.features for s in scenes])
            triples = torch.cat([triples_of(s.scene) for s in scenes])
            wanted = symbols(triples)
        say = recorder(self.folder / "log.jsonl", "projector")
        align_projector(
            self.projector, features, wanted, triples[:, 0] > 0, self.recipe.fit_steps, say
        )

    @torch.no_grad()
    def scene(self, split: Split, number: int, things: int | None) -> EncodedScene:
        """Returns a scene and its features, which are kept.

        Args:
            split: whose photographs and digits it shows.
            number: seed of the scene.
            things: objects; None as the tasks have them.
        """
        key = (split, number, things)
        if key not in self.encoded:
            rng = np.random.default_rng([TRAIN_SEED, 77, ["train", "val"].index(split), number])
            scene = make_scene(rng, split, things)
            pixels = pixels_of([scene])
            features = tower_features(vision_transformer(self.model), pixels)[0].half()
            without_pixels = Scene(
                scene.pixels[:0], scene.things, scene.patch_names, scene.patch_colors
            )
            self.encoded[key] = EncodedScene(without_pixels, features)
        return self.encoded[key]

    def block(self, kind: str, question: Question) -> QuestionBlock:
        """Writes a question and its answer as the chat template does; single words stand alone."""
        return self.chat.block(question.subset if kind == "pair" else kind, question)

    def row(
        self, rng: np.random.Generator, encoded: EncodedScene, level: Level, extra: int | None
    ) -> Row:
        """Makes a row of questions about one scene.

        Args:
            rng: draws them.
            encoded: the scene.
            level: number and kinds of questions.
            extra: background tokens; None for all.
        """
        kinds = [kind for kind, share in level.shares.items() for _ in range(share)]
        blocks: dict[str, QuestionBlock] = {}
        for _ in range(4 * level.questions):
            kind = kinds[int(rng.integers(len(kinds)))]
            question = MAKERS[kind](rng, encoded.scene)
            if question is not None and len(blocks) < level.questions:
                blocks[question.text] = self.block(kind, question)
        if extra is None:
            return Row(self.chat.first, list(blocks.values()), encoded.features)
        shown = encoded.scene.patch_names.ravel() > 0
        drawn = rng.permutation(np.flatnonzero(~shown))[:extra]
        keep = torch.from_numpy(np.sort(np.concatenate([np.flatnonzero(shown), drawn])))
        if rng.random() < 0.5:
            return Row(self.chat.first, list(blocks.values()), encoded.features[keep])
        return Row(
            self.chat.first, list(blocks.values()), encoded.features[keep], keep, GRID * GRID
        )

    def _done(self) -> float:
        """Returns the share of the training that is done."""
        if self.recipe.minutes is None:
            return self.progress.step / self.recipe.steps
        return self.progress.spent / (60 * self.recipe.minutes)

    def _level(self) -> Level:
        return next(level for level in self.recipe.levels if self._done() < level.until)

    def rows(self, rng: np.random.Generator, level: Level) -> list[Row]:
        """Draws a batch of rows about images."""
        rows = []
        whole = level.extra is None or rng.random() < level.whole
        for _ in range(1 if whole else self.recipe.images):
            k = int(rng.integers(self.recipe.scenes))
            things = None if level.things is None else level.things[0] + k % 2
            extra = None if whole else int(rng.integers(0, (level.extra or 0) + 1))
            rows.append(self.row(rng, self.scene("train", k, things), level, extra))
        return rows

    @torch.no_grad()
    def _texts(self) -> tuple[list[list[tuple[Tensor, int]]], list[Tensor]]:
        """Returns what SmolLM2's own distribution is kept on, as token ids.

        These are conversations with the index where the answer starts, in groups of like length,
        and plain text.
        """
        kept = self.folder / "texts.safetensors"
        texts = load_tensors(kept) if kept.is_file() else self._plain()
        prompts = instructions("train")
        rng = np.random.default_rng([TRAIN_SEED, 8])
        prompts += [text_task.ask(rng).text for _ in range(self.recipe.own // 8)]
        number = len(prompts) + self.recipe.own
        self.adapters(False)
        while (batch := int(texts.get("batches", 0))) * 24 < number:
            chosen = prompts[24 * batch : 24 * batch + 24]
            with torch.autocast("cpu", torch.bfloat16, enabled=self.dtype == torch.bfloat16):
                if not chosen:
                    chosen = write_instructions(
                        self.model, self.tokenizer, self.chat.first, 32, TRAIN_SEED + batch
                    )
                    chosen = without(chosen, instructions("held out"))[:24]
                chats = [self._chat(text) for text in chosen]
                for k, (ids, start) in enumerate(answer(self.model, self.tokenizer, chats)):
                    name = f"{24 * batch + k:05d}"
                    texts |= {f"conversation.{name}": ids, f"start.{name}": torch.tensor(start)}
            texts["batches"] = torch.tensor(batch + 1)
            with atomic_path(kept) as partial:
                save_tensors(partial, texts)
        self.adapters(True)
        starts = tensors_below("start.", texts)
        pairs = [
            (ids, int(starts[name])) for name, ids in tensors_below("conversation.", texts).items()
        ]
        pairs.sort(key=lambda pair: len(pair[0]))
        size = self.recipe.text_rows
        groups = [pairs[k : k + size] for k in range(0, len(pairs), size)]
        return groups, list(tensors_below("plain.", texts).values())

    def _plain(self) -> dict[str, Tensor]:
        ids = self.tokenizer(package_text("train"), verbose=False).input_ids
        parts = [part for text in ids for part in torch.tensor(text[:6000]).split(128)]
        return {f"plain.{k:05d}": part for k, part in enumerate(parts) if len(part) > 40}

    def answer_loss(self, rows: list[Row]) -> tuple[Tensor, dict[str, list[bool]]]:
        """Returns the mean cross-entropy of the answers' tokens, and which answers are right, by kind.

        An answer is right if argmax gives each of its tokens, the end's aside.
        """
        batch = padded(pack(rows, self.tokenizer, self.model.config.image_token_id))
        embeds = self.words(batch.ids)
        images = [row.image.float() for row in rows if row.image is not None]
        if images:
            shown = (batch.ids == self.model.config.image_token_id).unsqueeze(-1)
            embeds = embeds.masked_scatter(shown, self.projector(torch.cat(images)))
        hidden_states = self.decoder(
            inputs_embeds=embeds.to(self.dtype), attention_mask=batch.mask.to(self.dtype),
            position_ids=batch.positions, use_cache=False,
        ).last_hidden_state  # fmt: skip
        is_answer = batch.labels != IGNORE
        logits = nn.functional.linear(hidden_states[is_answer], self.head).float()
        labels = batch.labels[is_answer]
        hits = logits.argmax(-1) == labels
        right = answers_right(batch.kinds, labels, hits, self.tokenizer.eos_token_id)
        return cross_entropy(logits, labels), right

    def own_loss(self, group: int) -> Tensor:
        """Returns the mean divergence from SmolLM2's own distribution over its answers' tokens.

        Args:
            group: of conversations; SmolLM2's states of them are kept once they are known.
        """
        chosen = self.conversations[group]
        spans = [(start - 1, len(ids) - 1) for ids, start in chosen]
        return self._divergence([ids for ids, _ in chosen], spans, group)

    def plain_loss(self, texts: list[Tensor]) -> Tensor:
        """Returns the mean divergence from SmolLM2's own distribution over plain texts' tokens."""
        return self._divergence(texts, [(0, len(ids)) for ids in texts], None)

    def _divergence(
        self, texts: list[Tensor], spans: list[tuple[int, int]], group: int | None
    ) -> Tensor:
        """Returns the mean Kullback-Leibler divergence from SmolLM2's own distribution, ().

        Args:
            texts: token ids, (n,) each.
            spans: first and end of the tokens of each text that are read.
            group: of texts that come again, whose own states are kept; None for others.
        """
        # The distribution after token i is that of token i + 1; padding is never read.
        length = -(-max(map(len, texts)) // 32) * 32
        tokens = torch.stack([nn.functional.pad(ids, (0, length - len(ids))) for ids in texts])
        index = torch.arange(length)
        read = torch.stack([(index >= start) & (index < stop) for start, stop in spans])
        embeds = self.words(tokens).to(self.dtype)

        def states() -> Tensor:
            hidden_states: Tensor = self.decoder(
                inputs_embeds=embeds, use_cache=False
            ).last_hidden_state
            return hidden_states[read]

        def log_probabilities(states: Tensor) -> Tensor:
            return log_softmax(nn.functional.linear(states, self.head).float(), -1)

        own = None if group is None else self.own_states.get(group)
        with torch.no_grad():
            if own is None:
                self.adapters(False)
                own = states()
                self.adapters(True)
            if group is not None:
                self.own_states[group] = own
            wanted = log_probabilities(own)
        return kl_div(log_probabilities(states()), wanted, log_target=True, reduction="batchmean")

    def run(self, until: int | None = None) -> None:
        """Trains to the end, or to step `until`."""
        train, validation = (
            recorder(self.folder / "log.jsonl", stage) for stage in ("train", "validation")
        )
        saved = time.monotonic()
        while self._done() < 1 and (until is None or self.progress.step < until):
            level = self._level()
            rng = np.random.default_rng([TRAIN_SEED, self.recipe.seed, self.progress.step])
            started = time.monotonic()
            figures = self._step(rng, level)
            figures["took"] = time.monotonic() - started
            self.progress.spent += figures["took"]
            if self.progress.step % 20 == 0:
                train(self.progress.step, level=self.recipe.levels.index(level), **figures)
            self.progress.step += 1
            if self.progress.step % 50 == 0 or time.monotonic() - saved > SAVE_SECONDS:
                self.save()
                saved = time.monotonic()
            if self.progress.step % 150 == 0:
                validation(self.progress.step, **self.validate())
        if self._done() >= 1 and self.progress.step % 150:
            validation(self.progress.step, **self.validate())
        self.save()

    def _step(self, rng: np.random.Generator, level: Level) -> dict[str, float]:
        recipe, running = self.recipe, self.progress.running
        warm = min(1.0, (self.progress.step + 1) / 40)
        left = min(1.0, (1 - self._done()) / recipe.decay)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * warm * max(0.01, left)
        loss, right = self.answer_loss(self.rows(rng, level))
        loss.backward()
        figures = {"loss": loss.item()}
        divergences = {"own": self.own_loss(int(rng.integers(len(self.conversations))))}
        (recipe.text_weight * divergences["own"]).backward()
        if self.progress.step % 4 == 0:
            drawn = rng.integers(len(self.plain), size=2)
            divergences["plain"] = self.plain_loss([self.plain[int(k)] for k in drawn])
            (recipe.text_weight * divergences["plain"]).backward()
        for kind, divergence in divergences.items():
            before = running.get(kind, divergence.item())
            running[kind] = before + 0.05 * (divergence.item() - before)
        for name, parameter in self.live.items():
            self.lora[name].grad = None if parameter.grad is None else parameter.grad.float()
            parameter.grad = None
        nn.utils.clip_grad_norm_([*self.lora.values(), *self.projector.parameters()], 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._copy_master()
        self.progress.count(right, 0.01, 0.5)
        return figures | dict(sorted(running.items()))

    @torch.no_grad()
    def validate(self, scenes: int = 20) -> dict[str, float]:
        """Returns the share of right answers by task on validation scenes with all image tokens."""
        found: dict[str, list[bool]] = {}
        for k in range(scenes):
            rng = np.random.default_rng([TRAIN_SEED, 5, k])
            level = Level(1, None, None, 18, dict.fromkeys(TASKS, 1))
            rows = [self.row(rng, self.scene("val", k, None), level, None)]
            for kind, hits in self.answer_loss(rows)[1].items():
                found.setdefault(kind, []).extend(hits)
        shares = {kind: fmean(hits) for kind, hits in sorted(found.items())}
        return shares | {"mean": fmean(shares.values())}

    def _trained(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self.lora.items():
            yield f"lora.{name}", parameter
        for name, parameter in self.projector.named_parameters():
            yield f"projector.{name}", parameter

    def save(self) -> None:
        """Writes what a resumed training needs."""
        state = dict(self._trained()) | self.progress.tensors()
        state |= {f"moments.{n}": t for n, t in optimizer_tensors(self.optimizer).items()}
        with atomic_path(self.folder / "state.safetensors") as partial:
            save_tensors(partial, state)

    def write_adapter(self, folder: Path) -> None:
        """Writes LoRA as PEFT stores it for SmolLM2, and the projector, both in fp16.

        Args:
            folder: where to; it must exist.
        """
        config = LoraConfig(
            r=self.recipe.rank, lora_alpha=self.recipe.rank, target_modules=LINEAR,
            task_type="CAUSAL_LM", inference_mode=True,
            base_model_name_or_path="HuggingFaceTB/SmolLM2-135M-Instruct",
        )  # fmt: skip
        config.save_pretrained(str(folder))
        lora = {peft_name(name): factor.half() for name, factor in self.lora.items()}
        save_tensors(folder / "adapter_model.safetensors", lora)
        projector = {name: t.half() for name, t in self.projector.state_dict().items()}
        save_tensors(folder / PROJECTOR, projector)

    @torch.no_grad()
    def _read_adapter(self, folder: Path) -> None:
        """Starts from weights that `write_adapter` wrote."""
        saved = load_tensors(folder / "adapter_model.safetensors")
        for name, parameter in self.lora.items():
            parameter.copy_(saved[peft_name(name)])
        self.projector.load_state_dict(load_tensors(folder / PROJECTOR))
        self._copy_master()

    @torch.no_grad()
    def _restore(self) -> None:
        path = self.folder / "state.safetensors"
        state = load_tensors(path)
        self.progress = TrainingProgress.read(state)
        for name, parameter in self._trained():
            parameter.copy_(state[name])
        restore_moments(path, self.optimizer, tensors_below("moments.", state))
        self._copy_master()


def peft_name(name: str) -> str:
    """Returns what PEFT calls a factor in the file of an adapter of SmolLM2."""
    return f"base_model.model.model.{name.replace('.default', '')}"


def padded(batch: Packed, multiple: int = 64) -> Packed:
    """Returns a batch whose length is a multiple: oneDNN prepares each new shape anew, for a second."""
    length = batch.ids.shape[1]
    more = -length % multiple
    ids, positions = (nn.functional.pad(t, (0, more)) for t in (batch.ids, batch.positions))
    labels = nn.functional.pad(batch.labels, (0, more), value=IGNORE)
    mask = nn.functional.pad(batch.mask, (0, more, 0, more), value=torch.finfo(torch.float32).min)
    mask[..., range(length, length + more), range(length, length + more)] = 0
    return Packed(ids, positions, labels, mask, batch.kinds, batch.spans)


def triples_of(scene: Scene) -> Tensor:
    """Returns name, color and token index of each patch, (576, 3)."""
    labels = (scene.patch_names.ravel(), scene.patch_colors.ravel())
    return torch.from_numpy(np.stack([*labels, np.arange(GRID * GRID)], 1))
