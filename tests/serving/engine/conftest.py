"""An engine of vLLM in this process for each family, and the Hugging Face route to compare with."""

import os

os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0",  # the engine's parts can be looked at
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_NO_USAGE_STATS="1",
    VLLM_LOGGING_LEVEL="ERROR",
)

import gc
from functools import partial

import pytest
import tiny_families
import torch
import transformers
from tiny_families import Tiny

from vlm_prune.pruning.registry import build
from vlm_prune.vlm.families import family_of
from vlm_prune.vlm.serving import model as serving_model
from vlm_prune.vlm.serving.export import export
from vlm_prune.vlm.serving.settings import KEY, Settings

# vLLM's attention on CPUs takes heads of 32 and more
HEAD = 32
TOKENS = 10
BLOCK = 32  # tokens whose keys and values are cached together, 128 unless given
FAMILIES = ("llava", "llava_next", "qwen2_5_vl", "qwen3_vl", "internvl")
# models of a family around another tower, and what makes them
SIGLIP = partial(transformers.SiglipVisionConfig, vision_use_head=False)
OTHER_TOWERS = {"llava-siglip": ("llava", {"vision": SIGLIP})}


def pytest_collection_modifyitems(items):
    for item in items:
        if "engine" in item.path.parts:
            item.add_marker(pytest.mark.vllm)


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """An exported random checkpoint of each family, made when it is first asked for."""
    exported = {}

    def folder(family):
        if family not in exported:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(tiny_families, "HEAD", HEAD)
                patch.setattr(tiny_families, "WIDTH", 2 * HEAD)
                patch.setattr(tiny_families, "MROPE", [HEAD // 8, *[3 * HEAD // 16] * 2])
                name, options = OTHER_TOWERS.get(family, (family, {}))
                tiny = Tiny(name, **options)
            saved = tmp_path_factory.mktemp("saved") / family
            tiny.model.save_pretrained(saved)
            tiny.processor.save_pretrained(saved)
            exported[family] = saved.parent / "exported"
            export(str(saved), exported[family])
        return exported[family]

    return folder


class Engine:
    """vLLM with the plug-in on a checkpoint, and the same checkpoint in transformers."""

    def __init__(self, folder, method="zoo", budget=8, draw=0, **options):
        from transformers import AutoModelForImageTextToText, AutoProcessor
        from vllm import LLM

        self.model = AutoModelForImageTextToText.from_pretrained(folder, dtype="float32").eval()
        self.processor = AutoProcessor.from_pretrained(folder)
        values = {"method": method, "budget": budget, "seed": draw}
        settings = {} if method is None else {KEY: values}
        defaults = {
            "dtype": "float32", "max_model_len": 1024, "enforce_eager": True, "seed": 0,
            "skip_mm_profiling": True, "max_num_seqs": 4, "limit_mm_per_prompt": {"image": 2, "video": 0},
            "distributed_executor_backend": "uni", "additional_config": settings,
        }  # fmt: skip
        self.llm = LLM(str(folder), **(defaults | options))

    @property
    def served(self):
        """vLLM's model."""
        core = self.llm.llm_engine.engine_core.engine_core
        return core.model_executor.driver_worker.worker.get_model()

    def use(self, **settings):
        """Let the running engine prune in another way, with all of its caches as they are."""
        values = Settings.read(settings).as_dict()
        parts = self.served, self.llm.llm_engine.renderer.get_mm_processor()
        for config in {id(c): c for c in (parts[0].config, parts[1].info.get_hf_config())}.values():
            setattr(config, KEY, values)
        for part in parts:
            for name in ("settings", "pruner"):
                vars(part).pop(name, None)

    def answers(self, prompts, pictures):
        """Token ids that vLLM answers prompts with, given as pairs of picture numbers and text."""
        from vllm import SamplingParams

        chats = [
            [
                {
                    "role": "user",
                    "content": [
                        *({"type": "image_pil", "image_pil": pictures[n]} for n in numbers),
                        {"type": "text", "text": text},
                    ],
                }
            ]
            for numbers, text in prompts
        ]
        sampling = SamplingParams(temperature=0, max_tokens=TOKENS)
        outputs = self.llm.chat(chats, sampling, use_tqdm=False)
        self.cached = [output.num_cached_tokens or 0 for output in outputs]
        return [list(output.outputs[0].token_ids) for output in outputs]

    def embedded_answers(self, prompts, rows):
        """The same for images that are given as rows."""
        from vllm import SamplingParams

        sampling = SamplingParams(temperature=0, max_tokens=TOKENS)
        inputs = [
            {"prompt": self.chat(prompt), "multi_modal_data": {"image": own}}
            for prompt, own in zip(prompts, rows, strict=True)
        ]
        outputs = self.llm.generate(inputs, sampling, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    @torch.inference_mode()
    def unpruned_rows(self, prompt, pictures):
        """All rows of a Qwen-VL prompt's images, as vLLM takes them."""
        shown = [pictures[n] for n in prompt[0]]
        inputs = self.processor(text=[self.chat(prompt)], images=shown, return_tensors="pt")
        grid = inputs["image_grid_thw"]
        images = family_of(self.model).encode(
            pixel_values=inputs["pixel_values"], image_grid_thw=grid
        )
        rows = torch.cat([torch.cat(images.projected), *map(torch.cat, images.deepstack)], 1)
        return [{"image_embeds": rows, "image_grid_thw": grid}]

    @torch.inference_mode()
    def seeds(self, pictures):
        """What the Hugging Face route draws from each picture's pixels; it names a picture."""
        family, found = family_of(self.model), []
        for picture in pictures:
            inputs = self.processor(
                text=[self.chat(([0], ""))], images=[picture], return_tensors="pt"
            )
            names = ("pixel_values", "input_ids", *family.image_inputs)
            (group,) = family.encode(**{n: inputs[n] for n in names if n in inputs}).groups
            found += group.tokens.seeds
        return found

    def chat(self, prompt):
        """The text of a prompt."""
        numbers, text = prompt
        content = [{"type": "image"}] * len(numbers) + [{"type": "text", "text": text}]
        return self.processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )

    def reference(self, prompt, pictures, pruner):
        """What the Hugging Face route answers, and the token indices that it keeps."""
        numbers, _ = prompt
        shown = [pictures[n] for n in numbers] or None
        inputs = self.processor(text=[self.chat(prompt)], images=shown, return_tensors="pt")
        with pruner(self.model) as trace, torch.no_grad():
            ids = self.model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)
        answer = ids[0, inputs["input_ids"].shape[1] :].tolist()
        end = self.processor.tokenizer.eos_token_id
        if end in answer:
            answer = answer[: answer.index(end) + 1]
        return answer, [kept.tolist() for kept in trace.kept] if numbers else []

    def close(self):
        """Give the memory back."""
        if self.llm is not None:
            from vllm.distributed.ec_transfer import ec_transfer_state

            self.llm.llm_engine.engine_core.shutdown()
            ec_transfer_state._EC_CONNECTOR_AGENT = None  # one process, many engines
            self.llm = None
            gc.collect()


def among_placeholders(image, indices):
    """Where tokens stand among an image's placeholders, which may hold a newline after each row."""
    if image.placeholders == len(image.projected):
        return indices.tolist()
    (rows, columns), (_, across) = image.grids
    start = rows * columns
    line = (indices - start).div(across, rounding_mode="floor")
    return (indices + line.where(indices >= start, 0)).tolist()


@pytest.fixture
def choices(monkeypatch):
    """The seeds of images, and the token indices that vLLM's models keep, as they are chosen."""
    seen = []
    choose = serving_model.choose

    def noted(pruner, images, *rest):
        kept = choose(pruner, images, *rest)
        for image, (indices, _) in zip(images, kept, strict=True):
            seen.append((image.seed, among_placeholders(image, indices)))
        return kept

    monkeypatch.setattr(serving_model, "choose", noted)
    return seen


@pytest.fixture
def start():
    """Starts engines, and ends them after the test."""
    started = []

    def begin(*arguments, **options):
        started.append(Engine(*arguments, **options))
        return started[-1]

    yield begin
    for engine in started:
        engine.close()


@pytest.fixture(
    scope="module",
    params=[*FAMILIES, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHER_TOWERS)],
)
def engine(request, folders):
    """A chunk of the prompt is shorter than most prompts; prefixes are cached in blocks of few tokens."""
    engine = Engine(
        folders(request.param), "random", max_num_batched_tokens=32, enable_prefix_caching=True,
        block_size=BLOCK,
    )  # fmt: skip
    engine.family, _ = OTHER_TOWERS.get(request.param, (request.param, {}))
    yield engine
    engine.close()


@pytest.fixture(scope="session")
def pictures(folders):
    import numpy as np

    draw = np.random.default_rng(0)
    return [tiny_families.picture(draw, size) for size in tiny_families.PICTURES]


@pytest.fixture
def prompts():
    """Picture numbers and texts of different lengths: two pictures in one prompt, one without, and a
    picture that repeats.
    """
    return [
        ([0], "What color is the star?"),
        ([1], "Is there a 7?"),
        ([2, 0], "yes no green"),
        ([], "hello there red"),
        ([0], "What is it, red or blue? tell me more about the star and the 7 and the rest"),
    ]


@pytest.fixture
def pruner_of():
    return lambda values: build(
        values["method"], budget=values["budget"], **values.get("arguments", {})
    )
