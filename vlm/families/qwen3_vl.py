"""Qwen3-VL in transformers: Qwen2.5-VL without windows, with features for early decoder layers.

Those deepstack features go with their tokens: the same places are kept of them. They are no part of
what methods score before the language model. The attention is that of the tower's last layer, which
sees the whole image; without a CLS token, its attention is the mean over all patches.

Each frame of a video is a run of placeholders between two markers, behind its time as text.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from vlm_prune.vlm.families.qwen2_5_vl import Qwen25VL
from vlm_prune.vlm.layout import image_runs, stamped_frames
from vlm_prune.vlm.projector import Projector


@dataclass(frozen=True)
class Qwen3VL(Qwen25VL):
    """Paths into a `Qwen3VLForConditionalGeneration`."""

    @property
    def projector(self) -> Projector:
        merger = self.tower.merger
        return Projector(merger.linear_fc1, merger.act_fn, merger.linear_fc2)

    def normed(self, hidden_states: Tensor) -> Tensor:
        normed: Tensor = self.tower.merger.norm(hidden_states)
        return normed

    def in_rows(self, values: Tensor, grid: Tensor) -> Tensor:
        tokens: Tensor = values.unflatten(0, (-1, self.merged))
        return tokens

    def output(
        self, features: Sequence[Tensor], deepstack: Sequence[list[Tensor]] = ()
    ) -> dict[str, Any]:
        from transformers.models.qwen3_vl.modeling_qwen3_vl import (
            BaseModelOutputWithDeepstackFeatures,
        )

        return {
            "image": BaseModelOutputWithDeepstackFeatures(
                pooler_output=list(features),
                deepstack_features=[list(layer) for layer in deepstack],
            )
        }

    def frame_lines(
        self, input_ids: Tensor, ordinal: Tensor, frames: Sequence[int]
    ) -> Tensor | None:
        """Returns for each token the frame that it goes with, (B, L): a frame's tokens,
        the markers around them, and the time stamp in front.

        Args:
            input_ids: (B, L).
            ordinal: the image or video of each placeholder, -1 for text, (B, L).
            frames: of each video, 0 for images.
        """
        config = self.model.config
        opening, closing = config.vision_start_token_id, config.vision_end_token_id
        ids, spans, videos = input_ids.tolist(), [], []
        for row, column, length in image_runs(input_ids == config.video_token_id):
            line, end = ids[row], column + length
            # the run with its markers, where they are there
            first = column - int(column > 0 and line[column - 1] == opening)
            last = end + int(end < len(line) and line[end] == closing)
            spans.append((row, first, last))
            videos.append(int(ordinal[row, column]))
        return stamped_frames(input_ids, videos, spans, opening)
