"""A CLIP of open_clip or Hugging Face behind one set of methods: load, encode, save."""

import hashlib
import importlib
import math
import os
import re
from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from vlm_prune.continual.config import Tower, tower_of
from vlm_prune.continual.tiny import clip_checkpoint_path
from vlm_prune.vlm.checkpoint import (
    VOCABULARIES,
    check_finite,
    check_pixels,
    check_report,
    load_weights,
    locate,
    make_view,
    read_config,
    view_of,
)
from vlm_prune.vlm.common.errors import InputError, naming
from vlm_prune.vlm.common.files import read_object, write_json
from vlm_prune.vlm.common.state import save_tensors, writing

OPEN_CLIP, OPEN_CLIP_WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"
HUGGING_FACE = {
    "clip": ("CLIPModel", "CLIPProcessor"),
    "siglip": ("SiglipModel", "SiglipProcessor"),  # of SigLIP 2, too, at one resolution
    "siglip2": ("Siglip2Model", "Siglip2Processor"),
}
INTERPOLATIONS = {2: "bilinear", 3: "bicubic"}  # by Pillow's number of the filter
TOKENIZER_OPTIONS = ("clean", "strip_sep_token")
DEFAULT = ("ViT-B-16-quickgelu", "openai")
Transform = Callable[[Image.Image], Tensor]


def extra(name: str) -> Any:
    """Imports an optional library.

    Raises:
        InputError: if it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError:
        raise InputError(f"this needs {name}: pip install 'vlm-prune[clip,train]'") from None


@dataclass
class Clip:
    """A CLIP, its tokenizer and its image transforms.

    Args:
        model: an open_clip `CLIP` or `CustomTextCLIP` (timm vision towers included), or a `CLIPModel`,
            `SiglipModel` or `Siglip2Model` of Hugging Face.
        tokenize: texts to token ids (n, length).
        train_transform: an image to pixels (3, H, W), with augmentation drawn from torch's
            global generator.
        eval_transform: the same without augmentation.
        processor: what `save` stores beside a Hugging Face model.
        config: open_clip's `model_cfg`, which `save` writes beside an open_clip model.
    """

    model: Any
    tokenize: Callable[[list[str]], Tensor]
    train_transform: Transform
    eval_transform: Transform
    processor: Any = None
    config: dict[str, Any] | None = None

    @property
    def hugging_face(self) -> bool:
        """Returns whether the model is Hugging Face's."""
        return hasattr(self.model, "get_image_features")

    @property
    def device(self) -> torch.device:
        """Returns the device of the weights."""
        device: torch.device = self.model.logit_scale.device
        return device

    @property
    def scale(self) -> Tensor:
        """Returns what cosines are multiplied by, ()."""
        scale: Tensor = self.model.logit_scale.detach().float().exp().reshape(())
        return scale

    def encode_image(self, pixels: Tensor) -> Tensor:
        """Returns unit features (n, d) in float32 of pixels (n, 3, H, W)."""
        if not self.hugging_face:
            return _unit(self.model.encode_image(pixels))
        if self.model.config.model_type == "siglip2":
            return _unit(self.model.get_image_features(**patch_inputs(self.model, pixels)))
        return _unit(self.model.get_image_features(pixels))

    def encode_text(self, ids: Tensor) -> Tensor:
        """Returns unit features (n, d) in float32 of token ids (n, length)."""
        encode = self.model.get_text_features if self.hugging_face else self.model.encode_text
        return _unit(encode(ids))

    @torch.no_grad()
    def encode_texts(self, texts: Iterable[str], batch: int = 256) -> Tensor:
        """Returns unit features (n, d) of texts, without gradients."""
        ids = self.tokenize(list(texts)).to(self.device)
        return torch.cat([self.encode_text(part) for part in ids.split(batch)])

    def parameters(self, tower: Tower | None = None) -> dict[str, nn.Parameter]:
        """Returns parameters by name, of one tower or of both; the
        logit scale belongs to neither.
        """
        return {
            name: parameter
            for name, parameter in self.model.named_parameters()
            if not name.startswith("logit_") and tower in (None, tower_of(name))
        }

    def trains(self, tower: Tower) -> bool:
        """Returns whether some parameter of a tower takes gradients."""
        return any(parameter.requires_grad for parameter in self.parameters(tower).values())

    def recompute_activations(self, on: bool) -> None:
        """Makes training recompute the activations of each block in the backward pass, or keep them."""
        if not self.hugging_face:
            self.model.set_grad_checkpointing(on)
            return
        switch = "enable" if on else "disable"
        # transformers renamed it
        found = getattr(self.model, f"activation_checkpointing_{switch}", None)
        found = found or getattr(self.model, f"gradient_checkpointing_{switch}")
        found(*([{"use_reentrant": False}] if on else []))

    def fingerprint(self) -> str:
        """Returns a short digest of all weights and their names."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(name.encode())
            plain = tensor.detach().cpu().contiguous().flatten()
            digest.update(plain.view(torch.uint8).numpy().data)
        return digest.hexdigest()[:16]

    def save(self, folder: Path) -> None:
        """Writes a plain checkpoint of the model's own library, safetensors only.

        A Hugging Face model is read with its class's `from_pretrained(folder)`, an open_clip one
        with `open_clip.create_model(f"local-dir:{folder}")` if `config` is known. A tokenizer that
        is not open_clip's built-in one is stored beside it.
        """
        folder.mkdir(parents=True, exist_ok=True)
        with writing(folder):
            if self.hugging_face:
                self.model.save_pretrained(folder)
                if self.processor is not None:
                    self.processor.save_pretrained(folder)
                return
            if hasattr(self.tokenize, "save_pretrained"):
                self.tokenize.save_pretrained(folder)
        save_tensors(folder / OPEN_CLIP_WEIGHTS, self.model.state_dict())
        if self.config is not None:
            preprocess = getattr(self.model.visual, "preprocess_cfg", {})
            config = {"model_cfg": self.config, "preprocess_cfg": preprocess}
            write_json(folder / OPEN_CLIP, config)


def _unit(output: Any) -> Tensor:
    features: Tensor = output if isinstance(output, Tensor) else output.pooler_output
    return F.normalize(features.float(), dim=-1)


def patch_inputs(model: Any, pixels: Tensor) -> dict[str, Tensor]:
    """Returns what the vision tower of a `Siglip2Model` reads of images of one size, all patches shown.

    Args:
        model: a `Siglip2Model`.
        pixels: (n, 3, H, W), whose sides are multiples of a patch's.
    """
    side = model.config.vision_config.patch_size
    rows, columns = (length // side for length in pixels.shape[-2:])
    # (n, 3, rows, side, columns, side) -> (n, rows columns, side side 3)
    patches = pixels.unflatten(3, (columns, side)).unflatten(2, (rows, side))
    patches = patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
    return {
        "pixel_values": patches,
        "pixel_attention_mask": torch.ones(patches.shape[:2], dtype=torch.int32).to(pixels.device),
        "spatial_shapes": torch.tensor([[rows, columns]] * len(pixels)).to(pixels.device),
    }


def from_open_clip(model: Any, tokenize: Any, config: dict[str, Any] | None = None) -> Clip:
    """Returns an open_clip model as a `Clip`; its transforms follow its `preprocess_cfg`.

    Args:
        model: open_clip's `CLIP` or `CustomTextCLIP`.
        tokenize: its tokenizer.
        config: open_clip's `model_cfg`, for `Clip.save`.
    """
    transform = extra("open_clip.transform")
    settings = dict(getattr(model.visual, "preprocess_cfg", None) or {})
    size = settings.get("size") or model.visual.image_size
    check_pixels(**{f"preprocess_cfg's {key}": settings.get(key) for key in ("mean", "std")})
    settings["size"] = tuple(size) if isinstance(size, list | tuple) else size
    preprocess = transform.PreprocessCfg(**settings)
    train, test = (transform.image_transform_v2(preprocess, is_train=t) for t in (True, False))
    return Clip(model.eval(), tokenize, train, test, config=config)


def from_hugging_face(model: Any, processor: Any) -> Clip:
    """Wraps a `CLIPModel`, `SiglipModel` or `Siglip2Model` and its processor.

    SigLIP's images are squeezed into a square, as its processor does. SigLIP 2 takes images of many
    shapes; here all are squeezed into the largest square that its patches fill.
    """
    transform, pictures = extra("open_clip.transform"), processor.image_processor
    vision, mean, std = model.config.vision_config, pictures.image_mean, pictures.image_std
    check_pixels(image_mean=mean, image_std=std)
    options: dict[str, Any] = {"mean": tuple(mean), "std": tuple(std)}
    if model.config.model_type != "clip":
        options |= {
            "resize_mode": "squash",
            "interpolation": INTERPOLATIONS[int(pictures.resample)],
        }
    # SigLIP 2's position embeddings are a square grid of so many patches
    grid = getattr(vision, "num_patches", None)
    size = math.isqrt(grid) * vision.patch_size if grid else vision.image_size
    train, test = (transform.image_transform(size, is_train=t, **options) for t in (True, False))
    length = model.config.text_config.max_position_embeddings

    def tokenize(texts: list[str]) -> Tensor:
        # SigLIP pools the last position, and Gemma's tokenizer, which SigLIP 2 has, pads on the left
        kind = {"padding": "max_length", "truncation": True, "max_length": length}
        encoded = processor.tokenizer(texts, return_tensors="pt", padding_side="right", **kind)
        ids: Tensor = encoded["input_ids"]
        return ids

    return Clip(model.eval(), tokenize, train, test, processor=processor)


def check_activation(name: str, pretrained: str) -> None:
    """Refuses a model whose activation is not the one that its weights were trained with.

    open_clip builds `ViT-B-16` with plain GELU even for OpenAI's weights, which costs some four
    points of accuracy, and only warns.

    Raises:
        InputError: if QuickGELU is needed and missing; it names the build that has it.
    """
    open_clip = extra("open_clip")
    config = open_clip.get_model_config(name) or {}
    tag = open_clip.pretrained.get_pretrained_cfg(name, pretrained)
    if tag.get("quick_gelu", False) and not config.get("quick_gelu", False):
        raise InputError(
            f"the {pretrained!r} weights need QuickGELU, but {name!r} has plain GELU; "
            f"use '{name}-quickgelu'"
        )


def load_clip(name: str = DEFAULT[0], pretrained: str | None = DEFAULT[1]) -> Clip:
    """Loads a CLIP by open_clip's name and weights, by Hugging Face's, or from a folder of either.

    Only safetensors are read, and no code from a checkpoint is run.

    Args:
        name: `tiny` for the embedded CLIP, a model of open_clip, a hub name "owner/model" of a
            Hugging Face CLIP or SigLIP, or a folder with `open_clip_config.json` or `config.json`.
        pretrained: open_clip's tag or a safetensors file; None for random weights; only for a
            model of open_clip.

    Raises:
        InputError: if there is no such model, its folder is damaged, or weights are missing, not
            finite, no safetensors, more than its configuration describes, or need another
            activation.
    """
    folder = clip_checkpoint_path() if name == "tiny" else Path(name)
    with naming(f"cannot load CLIP {name!r}"):
        if (folder / OPEN_CLIP).is_file():
            return _load_folder(folder)
        if folder.is_dir() or "/" in name:
            return _load_hugging_face(name)
        return _load_open_clip(name, pretrained)


def _load_hugging_face(name: str) -> Clip:
    transformers = extra("transformers")
    view = view_of(locate(name, {}))
    kind = read_object(view / "config.json").get("model_type")
    if kind not in HUGGING_FACE:
        raise InputError(
            f"its model type is {kind!r}; give a CLIP or SigLIP of Hugging Face or open_clip"
        )
    model_class, processor_class = (getattr(transformers, name) for name in HUGGING_FACE[kind])
    model = load_weights(model_class, view, read_config(view), dtype="float32")
    model.name_or_path = model.config.name_or_path = name
    processor = processor_class.from_pretrained(view, trust_remote_code=False)
    return from_hugging_face(model, processor)


def _load_folder(folder: Path) -> Clip:
    """Loads a CLIP from a folder of open_clip's layout.

    open_clip hands `tokenizer_kwargs` of a folder to the tokenizer's loader and builds towers of
    other libraries by name, from the network too; so it sees a folder with checked settings alone.
    """
    open_clip = extra("open_clip")
    if not (folder / OPEN_CLIP_WEIGHTS).is_file():
        raise InputError(f"{folder} holds no {OPEN_CLIP_WEIGHTS}")
    view = make_view(
        folder,
        [OPEN_CLIP, "tokenizer_config.json", "special_tokens_map.json"],
        [*VOCABULARIES, OPEN_CLIP_WEIGHTS],
    )
    settings = read_object(view / OPEN_CLIP)
    config = _checked(settings.get("model_cfg"))
    _check_weights(open_clip, config, view / OPEN_CLIP_WEIGHTS)
    model = open_clip.create_model(f"local-dir:{view}")
    check_finite(model.state_dict())
    tokenizer = _tokenizer(open_clip, f"local-dir:{view}", config)
    return from_open_clip(model, tokenizer, config)


def _checked(config: Any) -> dict[str, Any]:
    """Returns a model's settings, and refuses those that would make
    open_clip load more than the folder.
    """
    towers = ("vision_cfg", "text_cfg")
    if not isinstance(config, dict) or any(not isinstance(config.get(t), dict) for t in towers):
        raise InputError(f"{OPEN_CLIP} describes no model with {' and '.join(towers)}")
    vision, text = (config[tower] for tower in towers)
    for name in ("hf_model_name", "hf_model_config"):
        if text.get(name):
            raise InputError(f"text_cfg has {name}; text towers of other checkpoints are not read")
    tower = vision.get("timm_model_name")
    if tower and not (re.fullmatch(r"[\w.]+", str(tower)) and extra("timm").is_model(tower)):
        raise InputError(f"timm has no model {tower!r}")
    options = text.get("tokenizer_kwargs") or {}
    for name in options:
        if name not in TOKENIZER_OPTIONS:
            known = ", ".join(TOKENIZER_OPTIONS)
            raise InputError(f"tokenizer_kwargs has {name!r}; only {known} are passed on")
    return config


def _check_weights(open_clip: Any, config: dict[str, Any], weights: Path) -> None:
    """Compares the names and shapes in a file with those of a model that takes no memory.

    Args:
        open_clip: the library.
        config: checked settings of the folder.
        weights: file of the folder.

    Raises:
        InputError: if they differ.
    """
    safetensors = extra("safetensors")
    with safetensors.safe_open(weights, "pt") as file:
        stored = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    for tower in ("vision_cfg", "text_cfg"):
        layers = config[tower].get("layers")
        if isinstance(layers, int) and layers > len(stored):
            raise InputError(
                f"{tower} has {layers} layers, but the weights are {len(stored)} tensors"
            )
    arguments = deepcopy(config)
    custom = arguments.pop("custom_text", False)
    kind = "CoCa" if "multimodal_cfg" in config else "CustomTextCLIP" if custom else "CLIP"
    with torch.device("meta"):
        state = getattr(open_clip, kind)(**arguments).state_dict()
    described = {name: tuple(tensor.shape) for name, tensor in state.items()}
    check_report(
        described.keys() - stored.keys(),
        stored.keys() - described.keys(),
        [
            (name, stored[name], shape)
            for name, shape in described.items()
            if name in stored
            and stored[name] != shape
            and not math.prod(stored[name]) == math.prod(shape) == 1  # older logit scales
        ],
    )


def _tokenizer(open_clip: Any, name: str, config: dict[str, Any]) -> Any:
    from_hub = bool(config["text_cfg"].get("hf_tokenizer_name"))
    options = {"trust_remote_code": False} if from_hub else {}
    return open_clip.get_tokenizer(name, **options)


def _load_open_clip(name: str, pretrained: str | None) -> Clip:
    open_clip = extra("open_clip")
    config = open_clip.get_model_config(name)
    if config is None:
        near = get_close_matches(name, ["tiny", *open_clip.list_models()], n=1)
        hint = f"did you mean {near[0]!r}?" if near else "see open_clip.list_models()"
        raise InputError(f"open_clip has no model {name!r}; {hint}")
    if pretrained is not None:
        check_activation(name, pretrained)
        tag = open_clip.pretrained.get_pretrained_cfg(name, pretrained)
        file = open_clip.pretrained.download_pretrained(tag) if tag else pretrained
        if not os.fspath(file).endswith(".safetensors"):
            raise InputError(f"{file} is not a safetensors file; other formats are not read")
    model = open_clip.create_model(name, pretrained=pretrained)
    check_finite(model.state_dict())
    return from_open_clip(model, _tokenizer(open_clip, name, config), config)
