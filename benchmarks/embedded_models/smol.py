"""Training the embedded LLaVA over SmolLM2: projector and LoRA on a frozen tower, resumable at any step.

Each step draws its scenes and questions from its own number, so that a run that was stopped and goes
on from its last state draws what an undisturbed one does.
"""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
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
    Maker,
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
from vlm_prune.benchmarks.embedded_models.source import TRAIN_SEED, pixels_of
from vlm_prune.benchmarks.embedded_models.symbols import Symbols, align_projector, word_ids
from vlm_prune.benchmarks.embedded_models.tower import tower_features
from vlm_prune.benchmarks.tasks import attribute, choice, count, exist, ocr, relation
from vlm_prune.benchmarks.tasks import text as text_task
from vlm_prune.benchmarks.tasks.base import Question, Split
from vlm_prune.benchmarks.tasks.scenes import COLORS, GRID, NAMES, Scene, make_scene
from vlm_prune.vlm.common.files import atomic_path
from vlm_prune.vlm.common.state import (
    load_tensors,
    optimizer_tensors,
    restore_moments,
    save_tensors,
)
from vlm_prune.vlm.load import load
from vlm_prune.vlm.smol import PROJECTOR
from vlm_prune.vlm.smol.base import language_folder, load_base
from vlm_prune.vlm.smol.config import llava_over, smol_processor


class LowRankLinear(torch.autograd.Function):
    """`x W' + x A' B'` with a frozen `W`, all in one type: half the passes over memory of separate ones."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """Returns the layer's output, (..., out), for inputs (..., in)."""
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
    """Let a PEFT layer of scale 1 compute by `LowRankLinear`."""
    base, a, b = layer.base_layer, layer.lora_A["default"], layer.lora_B["default"]

    def forward(x: Tensor) -> Tensor:
        if layer.disable_adapters:
            plain: Tensor = base(x)
            return plain
        out: Tensor = LowRankLinear.apply(x, base.weight, a.weight, b.weight)
        return out

    layer.forward = forward


LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TASKS: dict[str, Maker] = {
    "exist": exist.ask, "attribute": attribute.ask, "ocr": ocr.ask, "count": count.ask,
    "relation": relation.ask, "choice": choice.ask,
}  # fmt: skip


MAKERS: dict[str, Maker] = TASKS | {
    "where": where, "pair": pair, "side": side, "what": what, "letter": name_letter,
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
    """

    until: float
    things: tuple[int, int] | None
    extra: int | None
    questions: int
    shares: dict[str, int]


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


@dataclass(frozen=True)
class SmolRecipe:
    """Hyperparameters.

    Args:
        steps: of the optimizer.
        rank: of LoRA.
        rate: peak learning rate of LoRA.
        projector_rate: peak learning rate of the projector.
        images: rows with an image at each step.
        scenes: different training scenes.
        fit_scenes: those that the projector is first fitted on.
        fit_steps: of that.
        text_weight: of the divergence from SmolLM2's own distribution, beside the answers' loss.
        decay: share of the steps over which the rates fall.
        seed: of everything drawn.
    """

    steps: int = 1400
    rank: int = 16
    rate: float = 1e-3
    projector_rate: float = 3e-4
    images: int = 2
    scenes: int = 3000
    fit_scenes: int = 300
    fit_steps: int = 600
    text_weight: float = 5.0
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
    """

    def __init__(self, folder: Path, recipe: SmolRecipe, keep: Path | None = None) -> None:
        self.folder, self.recipe = folder, recipe
        torch.manual_seed(recipe.seed)
        language, _ = load_base()
        tiny, _ = load("tiny", "cpu")
        self.processor = smol_processor(language_folder())
        self.tokenizer = self.processor.tokenizer
        self.model = llava_over(language, self.processor, tiny.model.vision_tower)
        self.model.requires_grad_(False).eval()
        self.decoder = self.model.model.language_model
        self.projector = self.model.model.multi_modal_projector.requires_grad_(True)
        self.decoder.set_attn_implementation("eager")
        self._inject()
        self.optimizer = torch.optim.AdamW(
            [
                {"params": list(self.lora.values()), "peak": recipe.rate},
                {"params": list(self.projector.parameters()), "peak": recipe.projector_rate},
            ],
            weight_decay=0.0,
            betas=(0.9, 0.98),
        )
        self.head = self.model.lm_head.weight.detach().to(torch.bfloat16)
        before, after = self._chat("\0").split("\0")
        self.before, self.asking, self.after = before, "\n", after
        self.encoded: dict[tuple[Any, ...], EncodedScene] = {}
        self.step, self.running = 0, dict[str, float]()
        if (folder / "state.safetensors").is_file():
            self._restore()
        elif keep is not None:
            self._read_adapter(keep)
        else:
            self._fit_projector()
        self.texts = self._texts()

    def _inject(self) -> None:
        rank = self.recipe.rank
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=LINEAR)
        inject_adapter_in_model(config, self.decoder)
        self.words = nn.Embedding.from_pretrained(self.model.get_input_embeddings().weight.detach())
        self.live = {n: p for n, p in self.decoder.named_parameters() if "lora_" in n}
        self.lora = {n: nn.Parameter(p.detach().float()) for n, p in self.live.items()}
        self.decoder.layers.to(torch.bfloat16)
        self.decoder.norm.to(torch.bfloat16)
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
        """Gives the decoder its LoRA weights in bf16; the optimizer has those in fp32."""
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
            bare = Scene(scene.pixels[:0], scene.things, scene.patch_names, scene.patch_colors)
            self.encoded[key] = EncodedScene(bare, features)
        return self.encoded[key]

    def block(self, kind: str, question: Question) -> QuestionBlock:
        """Writes a question and its answer as the chat template does; single words stand alone."""
        if kind == "pair":
            return QuestionBlock(f" {question.text}", f" {question.answer}", question.subset)
        return QuestionBlock(f"{question.text}{self.after}", question.answer, kind)

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
        blocks: list[QuestionBlock] = []
        while len(blocks) < level.questions:
            kind = kinds[int(rng.integers(len(kinds)))]
            question = MAKERS[kind](rng, encoded.scene)
            if question is not None:
                blocks.append(self.block(kind, question))
        keep = torch.arange(GRID * GRID)
        if extra is not None:
            shown = encoded.scene.patch_names.ravel() > 0
            drawn = rng.permutation(np.flatnonzero(~shown))[:extra]
            keep = torch.from_numpy(np.sort(np.concatenate([np.flatnonzero(shown), drawn])))
        return Row(self.before, blocks, encoded.features[keep])

    def _level(self) -> Level:
        return next(level for level in LEVELS if self.step < level.until * self.recipe.steps)

    def rows(self, rng: np.random.Generator, level: Level) -> list[Row]:
        """Draws a batch of rows about images."""
        rows = []
        for _ in range(1 if level.extra is None else self.recipe.images):
            k = int(rng.integers(self.recipe.scenes))
            things = None if level.things is None else level.things[0] + k % 2
            extra = None if level.extra is None else int(rng.integers(0, level.extra + 1))
            rows.append(self.row(rng, self.scene("train", k, things), level, extra))
        return rows

    @torch.no_grad()
    def _texts(self) -> dict[str, list[Tensor]]:
        """Token ids of what SmolLM2's own distribution is kept on: plain text, and its own answers."""
        kept = self.folder / "texts.safetensors"
        if not kept.is_file():
            ids = self.tokenizer(package_text("train"), verbose=False).input_ids
            parts = [part for text in ids for part in torch.tensor(text[:6000]).split(128)]
            plain = {f"plain.{k:05d}": part for k, part in enumerate(parts) if len(part) > 40}
            answers = {f"answers.{k:05d}": ids for k, ids in enumerate(self._own_answers())}
            with atomic_path(kept) as partial:
                save_tensors(partial, plain | answers)
        texts: dict[str, list[Tensor]] = {}
        for name, ids in sorted(load_tensors(kept).items()):
            texts.setdefault(name.split(".")[0], []).append(ids)
        return texts

    def _own_answers(self, batch: int = 24) -> Iterator[Tensor]:
        """Yields SmolLM2's conversations about instructions and about what the task `text` asks."""
        rng = np.random.default_rng([TRAIN_SEED, 8])
        prompts = [*instructions("train"), *(text_task.ask(rng).text for _ in range(56))]
        self.adapters(False)
        for start in range(0, len(prompts), batch):
            asked = [self._chat(text) for text in prompts[start : start + batch]]
            inputs = self.tokenizer(asked, return_tensors="pt", padding=True)
            with torch.autocast("cpu", torch.bfloat16):
                out = self.model.generate(**inputs, max_new_tokens=56)
            for ids, mask in zip(out, inputs.attention_mask, strict=True):
                ids = ids[int((mask == 0).sum()) :]
                ends = (ids == self.tokenizer.eos_token_id).nonzero()[:, 0]
                yield ids[: int(ends[2]) + 1 if len(ends) > 2 else len(ids)]
        self.adapters(True)

    def answer_loss(self, rows: list[Row]) -> tuple[Tensor, dict[str, list[bool]]]:
        """Returns the summed cross-entropy of the answers' tokens, and which answers are right, by kind.

        An answer is right if argmax gives each of its tokens, the end's aside.
        """
        batch = padded(pack(rows, self.tokenizer, self.model.config.image_token_id))
        embeds = self.words(batch.ids)
        images = [row.image.float() for row in rows if row.image is not None]
        if images:
            shown = (batch.ids == self.model.config.image_token_id).unsqueeze(-1)
            embeds = embeds.masked_scatter(shown, self.projector(torch.cat(images)))
        hidden = self.decoder(
            inputs_embeds=embeds.bfloat16(), attention_mask=batch.mask.bfloat16(),
            position_ids=batch.positions, use_cache=False,
        ).last_hidden_state  # fmt: skip
        is_answer = batch.labels != IGNORE
        logits = nn.functional.linear(hidden[is_answer], self.head).float()
        labels = batch.labels[is_answer]
        words = labels != self.tokenizer.eos_token_id
        hits = logits.argmax(-1) == labels
        right: dict[str, list[bool]] = {}
        whole = True
        for kind, word, hit in zip(batch.kinds, words.tolist(), hits.tolist(), strict=True):
            if word:
                whole = whole and hit
            else:
                right.setdefault(kind, []).append(whole)
                whole = True
        return cross_entropy(logits, labels, reduction="sum"), right

    def base_loss(self, ids: list[Tensor]) -> Tensor:
        """Returns the mean divergence of next-token distributions from SmolLM2's own.

        Args:
            ids: texts of any length.
        """
        length = -(-max(map(len, ids)) // 32) * 32
        tokens = torch.stack([nn.functional.pad(text, (0, length - len(text))) for text in ids])
        real = torch.stack([torch.arange(length) < len(text) for text in ids])
        embeds = self.words(tokens).bfloat16()

        def logits() -> Tensor:
            hidden = self.decoder(inputs_embeds=embeds, use_cache=False).last_hidden_state
            return log_softmax(nn.functional.linear(hidden[real], self.head).float(), -1)

        with torch.no_grad():
            self.adapters(False)
            wanted = logits()
            self.adapters(True)
        return kl_div(logits(), wanted, log_target=True, reduction="batchmean")

    def run(self, until: int | None = None) -> None:
        """Trains to the end, or to step `until`."""
        train, validation = (
            recorder(self.folder / "log.jsonl", stage) for stage in ("train", "validation")
        )
        while self.step < min(self.recipe.steps, until or self.recipe.steps):
            level = self._level()
            rng = np.random.default_rng([TRAIN_SEED, self.recipe.seed, self.step])
            started = time.monotonic()
            figures = self._step(rng, level)
            figures["took"] = time.monotonic() - started
            if self.step % 20 == 0:
                train(self.step, level=LEVELS.index(level), **figures)
            self.step += 1
            if self.step % 50 == 0:
                self.save()
            if self.step % 150 == 0:
                validation(self.step, **self.validate())
        self.save()

    def _step(self, rng: np.random.Generator, level: Level) -> dict[str, float]:
        recipe = self.recipe
        warm = min(1.0, (self.step + 1) / 40)
        left = min(1.0, (recipe.steps - self.step) / (recipe.decay * recipe.steps))
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * warm * max(0.03, left)
        loss, right = self.answer_loss(self.rows(rng, level))
        count = 2 * sum(map(len, right.values()))
        (loss / count).backward()
        figures = {"loss": loss.item() / count}
        if self.step % 2 == 0:
            drawn = [kind[int(rng.integers(len(kind)))] for kind in self.texts.values()]
            kept = self.base_loss(drawn)
            (recipe.text_weight * kept).backward()
            before = self.running.get("base", kept.item())
            self.running["base"] = before + 0.05 * (kept.item() - before)
        for name, parameter in self.live.items():
            self.lora[name].grad = None if parameter.grad is None else parameter.grad.float()
            parameter.grad = None
        nn.utils.clip_grad_norm_([*self.lora.values(), *self.projector.parameters()], 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._copy_master()
        for kind, found in right.items():
            before = self.running.get(kind, 0.3)
            self.running[kind] = before + (fmean(found) - before) * min(0.5, 0.01 * len(found))
        return figures | dict(sorted(self.running.items()))

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
        """Writes the state."""
        state = dict(self._trained()) | {"step": torch.tensor(self.step)}
        state |= {f"moments.{n}": t for n, t in optimizer_tensors(self.optimizer).items()}
        state |= {f"running.{n}": torch.tensor(v) for n, v in self.running.items()}
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
        self.step = int(state["step"])
        for name, parameter in self._trained():
            parameter.copy_(state[name])
        restore_moments(path, self.optimizer, below("moments.", state))
        self._copy_master()
        self.running = {name: float(value) for name, value in below("running.", state).items()}


def below(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors whose names begin with a prefix, by the rest of their names."""
    return {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}


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
