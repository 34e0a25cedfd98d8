"""Ray Data's own stage for vLLM, in place of the pool of models.

Ray starts the engines, where the GPUs are, and hands them batches one after the other.
"""

from functools import partial
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from PIL.Image import Image

from vlm_prune.benchmarks.batch.config import MapConfig
from vlm_prune.benchmarks.batch.inputs import shown_of
from vlm_prune.benchmarks.evaluation.served import image_token_of, settings_of
from vlm_prune.vlm.load import EMBEDDED, config_of

if TYPE_CHECKING:
    from ray.data import Dataset

NO_VIDEOS = "videos are not answered by vLLM here; leave out --engine vllm"
# Ray's name for what keeps a row from an engine; such rows go past its stages
ERROR = "__inference_error__"


def vllm_answers(
    rows: "Dataset",
    config: MapConfig,
    schema: pa.Schema,
    batch_size: int,
    engines: int,
    share: dict[str, Any],
    decoding: dict[str, Any],
) -> "Dataset":
    """Returns the answers to rows of `decode`, greedy as those of the pool's models.

    Args:
        rows: of `decode`.
        config: of the answers.
        schema: of the answers.
        batch_size: images handed to an engine together.
        engines: how many.
        share: what an engine asks Ray for, `num_gpus` or `num_cpus`.
        decoding: what a task that opens images asks for.

    Raises:
        InputError: if vLLM is missing, or cannot serve the model so.
    """
    from ray.data.llm import build_processor, vLLMEngineProcessorConfig

    settings = settings_of(config.model, config.variant)
    on_cpus = "num_cpus" in share
    processor = build_processor(
        vLLMEngineProcessorConfig(
            model_source=str(EMBEDDED.get(config.model, config.model)),
            engine_kwargs=settings.engine_options(config.dtype, on_cpus, images=1),
            batch_size=batch_size,
            concurrency=(engines, engines),
            max_concurrent_batches=2,
            placement_group_config={"bundles": [{"CPU": share["num_cpus"]}]} if on_cpus else None,
            chat_template_stage={"num_cpus": 0, "concurrency": 1},
            tokenize_stage=False,
            detokenize_stage=False,
            should_continue_on_error=True,
            log_engine_metrics=False,
        ),
        preprocess=partial(engine_request, sampling=_greedy(config.model, config.max_new_tokens)),
        postprocess=partial(_answer, image_token=image_token_of(config_of(config.model))),
        preprocess_map_kwargs=decoding,
        postprocess_map_kwargs={"num_cpus": 0},
    )
    return processor(rows).map_batches(
        partial(_table, schema=schema), batch_format="pyarrow", num_cpus=0
    )


def _greedy(model: str, max_new_tokens: int | None) -> dict[str, Any]:
    """Returns vLLM's sampling parameters for what `generate` answers without sampling."""
    from transformers import GenerationConfig

    try:
        defaults = GenerationConfig.from_pretrained(str(EMBEDDED.get(model, model)))
    except OSError:  # a checkpoint may have none
        defaults = GenerationConfig()
    given = {
        "repetition_penalty": defaults.repetition_penalty,
        "max_tokens": max_new_tokens or defaults.max_new_tokens,
    }
    return {"temperature": 0.0} | {name: value for name, value in given.items() if value}


def engine_request(row: dict[str, Any], sampling: dict[str, Any]) -> dict[str, Any]:
    """Returns a row of `decode` as Ray's stages take it.

    vLLM gets no videos, and no images that could not be opened: such rows keep their error.
    """
    if row["error"]:
        return {"pixels": None, ERROR: row["error"]}
    shown = shown_of(row)
    if not isinstance(shown, Image):
        return {"pixels": None, ERROR: NO_VIDEOS}
    content = [{"type": "image"}, {"type": "text", "text": row["prompt"]}]
    return {
        "pixels": None,
        ERROR: "",
        "messages": [{"role": "user", "content": content}],
        "multimodal_data": {"image": [shown]},
        "sampling_params": dict(sampling),
    }


def _answer(row: dict[str, Any], image_token: int) -> dict[str, Any]:
    """Returns what is kept of an engine's row; rows with an error do not come here."""
    return {
        "row": row["row"],
        "answer": row["generated_text"].strip(),
        "kept_tokens": list(row["prompt_token_ids"]).count(image_token),
    }


def _table(batch: pa.Table, schema: pa.Schema) -> pa.Table:
    """Returns the rows of `map`'s table, with errors and without."""
    names = [name for name in ("row", "answer", "kept_tokens", ERROR) if name in batch.column_names]
    rows = [row | {"error": row[ERROR] or None} for row in batch.select(names).to_pylist()]
    return pa.Table.from_pylist(rows, schema=schema)
