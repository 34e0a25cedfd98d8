"""SmolVLM in transformers: tiles between text markers, 3 x 3 or 4 x 4 patches per token.

An image is several runs of placeholders, each behind a marker that names the tile; its overview
comes last, so the marker in front of a prompt's last run tells where images end. The projector is
one linear map, under which every token is equally sensitive. The SigLIP tower has no CLS token:
methods that read its attention read the mean over all patches of the tile.

Frames of a video are images of one tile, each behind its time as text.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn

from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.encoded import Images
from vlm_prune.vlm.families.base import Need
from vlm_prune.vlm.families.tiled import Tiled
from vlm_prune.vlm.layout import REMEDY, image_runs


@dataclass(frozen=True)
class SmolVLM(Tiled):
    """Paths into a `SmolVLMForConditionalGeneration`."""

    lacks: ClassVar[frozenset[Need]] = Tiled.lacks | {
        "a two-layer projector",
        "a nonlinear projector (a linear one is equally sensitive to all tokens)",
    }
    image_inputs: ClassVar[tuple[str, ...]] = ("pixel_attention_mask",)
    by_row: ClassVar[bool] = True
    frames_as_images: ClassVar[bool] = True
    frame_markers: ClassVar[tuple[int, int]] = (2, 1)

    def __post_init__(self) -> None:
        # before, its forward took whole tiles only
        if Version(transformers.__version__) < Version("5.21"):
            raise InputError(
                f"{type(self).__name__} needs transformers 5.21 or newer, "
                f"this is {transformers.__version__}; "
                "pip install -U transformers"
            )

    @property
    def decoder(self) -> Any:
        return self.model.model.text_model

    @property
    def view_tower(self) -> nn.Module:
        tower: nn.Module = self.model.model.vision_model
        return tower

    @property
    def tower_layers(self) -> Any:
        return self.model.model.vision_model.encoder.layers

    @property
    def tokens_per_image(self) -> int:
        return int(self.model.model.image_seq_len)

    @property
    def projector(self) -> Callable[[Tensor], Tensor]:
        module: Callable[[Tensor], Tensor] = self.model.model.connector.modality_projection
        return module

    def sizes(self, input_ids: Tensor, inputs: Mapping[str, Any]) -> list[int]:
        runs = image_runs(input_ids == self.image_token)
        if any(column == 0 for _, column, _ in runs):
            raise InputError(f"image placeholders must stand behind tile markers; {REMEDY}")
        # the prompt's last marker is an overview's, and an overview ends each image
        markers = [int(input_ids[row, column - 1]) for row, column, _ in runs]
        sizes, ended = [], True
        for (_, _, length), marker in zip(runs, markers, strict=True):
            if ended:
                sizes.append(0)
            sizes[-1] += length
            ended = marker == markers[-1]
        return sizes

    def patches(self, values: Tensor) -> Tensor:
        connector = self.model.model.connector
        shuffled: Tensor = connector.pixel_shuffle(values.contiguous(), connector.scale_factor)
        return shuffled

    @property
    def scored_layer(self) -> int:
        return -1

    def images(self, output: Any, pixel_values: Tensor, **inputs: Tensor) -> Images:
        """Returns the encoded images of (B, T, 3, H, W) tiles, rows padded
        with zeros; needs `input_ids`.
        """
        features = self.patches(output.last_hidden_state)
        projected = torch.cat(list(output.pooler_output)).unflatten(0, (len(features), -1))
        pixels = pixel_values.flatten(0, 1)
        # tiles of zeros pad rows with fewer images
        pixels = pixels[pixels.flatten(1).any(1)]
        return self.grouped(
            inputs, pixels, features, projected, partial(self.tower_query_key, output), False
        )
