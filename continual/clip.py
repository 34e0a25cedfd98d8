"""A CLIP of open_clip or Hugging Face behind one set of methods: load, encode, save."""

import hashlib
import importlib
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from vlm_prune.continual.config import Tower
from vlm_prune.continual.tiny import checkpoint_path
from vlm_prune.vlm.common.errors import InputError, first_line

DEFAULT = ("ViT-B-16-quickgelu", "openai")
Transform = Callable[[Image.Image], Tensor]


def extra(name: str) -> Any:
    """Import an optional library.

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
        model: an open_clip `CLIP` or `CustomTextCLIP` (timm vision towers included), or a Hugging
            Face `CLIPModel`.
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
        return hasattr(self.model, "get_image_features")

    @property
    def device(self) -> torch.device:
        device: torch.device = self.model.logit_scale.device
        return device

    @property
    def scale(self) -> Tensor:
        """What cosines are multiplied by, ()."""
        scale: Tensor = self.model.logit_scale.detach().float().exp().reshape(())
        return scale

    def encode_image(self, pixels: Tensor) -> Tensor:
        """Unit features (n, d) in float32 of pixels (n, 3, H, W)."""
        encode = self.model.get_image_features if self.hugging_face else self.model.encode_image
        return _unit(encode(pixels))

    def encode_text(self, ids: Tensor) -> Tensor:
        """Unit features (n, d) in float32 of token ids (n, length)."""
        encode = self.model.get_text_features if self.hugging_face else self.model.encode_text
        return _unit(encode(ids))

    @torch.no_grad()
    def encode_texts(self, texts: Iterable[str], batch: int = 256) -> Tensor:
        """Unit features (n, d) of texts, without gradients."""
        ids = self.tokenize(list(texts)).to(self.device)
        return torch.cat([self.encode_text(part) for part in ids.split(batch)])

    def parameters(self, tower: Tower | None = None) -> dict[str, nn.Parameter]:
        """Parameters by name, of one tower or of both; the logit scale belongs to neither."""
        return {
            name: parameter
            for name, parameter in self.model.named_parameters()
            if not name.startswith("logit_")
            and tower in (None, "vision" if name.startswith("vis") else "text")
        }

    def trains(self, tower: Tower) -> bool:
        """Whether some parameter of a tower takes gradients."""
        return any(parameter.requires_grad for parameter in self.parameters(tower).values())

    def fingerprint(self) -> str:
        """A short digest of all weights and their names."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(name.encode())
            plain = tensor.detach().cpu().contiguous().flatten()
            digest.update(plain.view(torch.uint8).numpy().data)
        return digest.hexdigest()[:16]

    def save(self, folder: Path) -> None:
        """Write a plain checkpoint of the model's own library, safetensors only.

        A Hugging Face model is read with `CLIPModel.from_pretrained(folder)`, an open_clip one
        with `open_clip.create_model(f"local-dir:{folder}")` if `config` is known. A tokenizer that
        is not open_clip's built-in one is stored beside it.
        """
        if self.hugging_face:
            self.model.save_pretrained(folder)
            if self.processor is not None:
                self.processor.save_pretrained(folder)
            return
        safetensors = extra("safetensors.torch")
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: t.contiguous() for name, t in self.model.state_dict().items()}
        safetensors.save_file(tensors, folder / "open_clip_model.safetensors")
        preprocess = getattr(self.model.visual, "preprocess_cfg", {})
        config = {"model_cfg": self.config, "preprocess_cfg": preprocess}
        if hasattr(self.tokenize, "save_pretrained"):
            self.tokenize.save_pretrained(folder)
        if self.config is not None:
            (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")


def _unit(output: Any) -> Tensor:
    features: Tensor = output if isinstance(output, Tensor) else output.pooler_output
    return F.normalize(features.float(), dim=-1)


def from_open_clip(model: Any, tokenize: Any, config: dict[str, Any] | None = None) -> Clip:
    """Wrap an open_clip model; its transforms follow its `preprocess_cfg`."""
    transform = extra("open_clip.transform")
    settings = dict(getattr(model.visual, "preprocess_cfg", None) or {})
    size = settings.get("size") or model.visual.image_size
    settings["size"] = tuple(size) if isinstance(size, list | tuple) else size
    preprocess = transform.PreprocessCfg(**settings)
    train, test = (transform.image_transform_v2(preprocess, is_train=t) for t in (True, False))
    return Clip(model.eval(), tokenize, train, test, config=config)


def from_hugging_face(model: Any, processor: Any) -> Clip:
    """Wrap a `CLIPModel` and its processor."""
    transform, pictures = extra("open_clip.transform"), processor.image_processor
    size, mean, std = model.config.vision_config.image_size, pictures.image_mean, pictures.image_std
    train, test = (
        transform.image_transform(size, is_train=t, mean=tuple(mean), std=tuple(std))
        for t in (True, False)
    )
    length = model.config.text_config.max_position_embeddings

    def tokenize(texts: list[str]) -> Tensor:
        kind = {"padding": "max_length", "truncation": True, "max_length": length}
        ids: Tensor = processor.tokenizer(texts, return_tensors="pt", **kind)["input_ids"]
        return ids

    return Clip(model.eval(), tokenize, train, test, processor=processor)


def check_activation(name: str, pretrained: str) -> None:
    """Refuse a model whose activation is not the one that its weights were trained with.

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
    """A CLIP by open_clip's name and weights, by Hugging Face's, or from a folder of either.

    Args:
        name: `tiny` for the embedded CLIP, a model of open_clip, a hub name "owner/model" of a Hugging Face CLIP, or a folder
            with `open_clip_config.json` or `config.json`.
        pretrained: open_clip's tag or a safetensors file; None for random weights; only for a
            model of open_clip.

    Raises:
        InputError: if there is no such model, the weights are not safetensors or need another
            activation.
    """
    folder = checkpoint_path() if name == "tiny" else Path(name)
    try:
        if (folder / "config.json").is_file() or ("/" in name and not folder.exists()):
            return _load_hugging_face(name)
        return _load_open_clip(str(folder) if folder.is_dir() else name, pretrained)
    except InputError:
        raise
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise InputError(f"cannot load CLIP {name!r}: {first_line(error)}") from error


def _load_hugging_face(name: str) -> Clip:
    transformers = extra("transformers")
    model = transformers.CLIPModel.from_pretrained(name, use_safetensors=True)
    return from_hugging_face(model.float(), transformers.CLIPProcessor.from_pretrained(name))


def _load_open_clip(name: str, pretrained: str | None) -> Clip:
    open_clip = extra("open_clip")
    folder = Path(name)
    if folder.is_dir():
        if not (folder / "open_clip_model.safetensors").is_file():
            raise InputError(f"{name} holds no open_clip_model.safetensors")
        config = json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]
        name, pretrained = f"local-dir:{folder}", None
    else:
        config = open_clip.get_model_config(name)
        if config is None:
            raise InputError(f"open_clip has no model {name!r}; see open_clip.list_models()")
    if pretrained is not None:
        check_activation(name, pretrained)
        tag = open_clip.pretrained.get_pretrained_cfg(name, pretrained)
        file = open_clip.pretrained.download_pretrained(tag) if tag else pretrained
        if not os.fspath(file).endswith(".safetensors"):
            raise InputError(f"{file} is not a safetensors file; other formats are not read")
    model = open_clip.create_model(name, pretrained=pretrained)
    return from_open_clip(model, open_clip.get_tokenizer(name), config)
