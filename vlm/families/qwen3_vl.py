"""Qwen3-VL in transformers: Qwen2.5-VL without windows, with features for early decoder layers.

Those deepstack features go with their tokens: the same places are kept of them. They are no part of
what methods score before the language model. The attention is that of the tower's last layer, which
sees the whole image; without a CLS token, its attention is the mean over all patches.

Each frame of a video is a run of placeholders between two markers, behind its time as text.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlm_prune.vlm.families.qwen2_5_vl import Qwen25VL
from vlm_prune.vlm.layout import image_runs
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

    def frame_lines(self, input_ids: Tensor, ordinal: Tensor) -> Tensor | None:
        """Returns for each token the frame that it goes with, (B, L): a frame's tokens,
        the markers around them, and the time stamp in front.

        A stamp begins behind the marker that closes the frame before it; a video's first, behind
        what opens the video. Where that is no marker, it begins with the token that begins the
        next.
        """
        config, frame = self.model.config, torch.full_like(input_ids, -1)
        opening, closing = config.vision_start_token_id, config.vision_end_token_id
        runs = image_runs(input_ids == config.video_token_id)
        ids, begins = input_ids.tolist(), []
        for number, (row, column, length) in enumerate(runs):
            line, end = ids[row], column + length
            # the run with its markers, where they are there
            first = column - int(column > 0 and line[column - 1] == opening)
            last = end + int(end < len(line) and line[end] == closing)
            frame[row, first:last] = number
            begins.append((row, first, last))
        # the time stamp in front of each frame goes with it
        videos = [int(ordinal[row, column]) for row, column, _ in runs]
        for number, (row, first, _) in enumerate(begins):
            line, start = ids[row], first
            video = videos[number]
            if number and videos[number - 1] == video:
                start = begins[number - 1][2]
            elif videos[number + 1 : number + 2] == [video]:
                # the first stamp is no longer than the next
                stamp = line[begins[number][2] : begins[number + 1][1]]
                near = range(first, max(0, first - len(stamp) - 1), -1)
                opened = [at for at in near if line[at - 1] == opening]
                start = next(iter(opened + [at for at in near if line[at] in stamp[:1]]), first)
            frame[row, start:first] = number
        return frame
