#!/usr/bin/env bash
# transformers 5.24.0: SmolVLM's processor drops the image of a prompt that shows an image and a video.
#
# SmolVLM2's model gets tiles of images and frames of videos by the same argument, `pixel_values`. Its processor makes both and puts
# the placeholders of both into the text, but a later entry of the dictionary replaces an earlier one: of a prompt with one image (5 tiles)
# and one video (4 frames) the frames alone come out, without a warning. The prompt then asks for 81 features, 36 are there, and
# the model refuses it because these numbers differ. InternVL's processor joins the two in the order of the text.
#
# Seen with torch 2.14.1, torchvision 0.29.1, transformers 5.24.0 on a CPU:
#   image alone (1, 5, 3, 48, 48) placeholders 45
#   video alone (1, 4, 3, 48, 48) placeholders 36
#   both (1, 4, 3, 48, 48) placeholders 81
# The script fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.14.1 torchvision==0.29.1 transformers==5.24.0 num2words==0.5.14 pillow
cat >"$folder/run.py" <<'PY'
import numpy as np
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    PreTrainedTokenizerFast, SmolVLMImageProcessor, SmolVLMProcessor, SmolVLMVideoProcessor,
)
from transformers.video_utils import VideoMetadata

words = WordLevel({"<unk>": 0, "Is": 1, "it": 2, "red": 3}, unk_token="<unk>")
plain = Tokenizer(words)
plain.pre_tokenizer = Whitespace()
markers = {f"row_{r}_col_{c}": f"<row_{r}_col_{c}>" for r in (1, 2, 3) for c in (1, 2, 3)}
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=plain, unk_token="<unk>", pad_token="<pad>",
    extra_special_tokens={
        "image_token": "<image>", "fake_image_token": "<fake_token_around_image>",
        "global_image_token": "<global-img>", "end_of_utterance_token": "<end_of_utterance>",
        "video_token": "<video>", **markers,
    },
)
sizes = {"size": {"longest_edge": 96}, "max_image_size": {"longest_edge": 48}}
processor = SmolVLMProcessor(
    SmolVLMImageProcessor(**sizes), tokenizer, SmolVLMVideoProcessor(**sizes), image_seq_len=9,
)
image, video = Image.new("RGB", (56, 56), "red"), np.zeros((4, 56, 56, 3), np.uint8)
told = VideoMetadata(total_num_frames=4, fps=1.0, duration=4.0, frames_indices=[0, 1, 2, 3], height=56, width=56)
shown = {"images": [[image]]}, {"videos": [[video]], "video_metadata": [[told]]}
found = {}
for name, text, given in (
    ("image alone", "<image> Is it red", shown[0]),
    ("video alone", "<video> Is it red", shown[1]),
    ("both", "<image> <video> Is it red", shown[0] | shown[1]),
):
    inputs = processor(text=[text], return_tensors="pt", **given)
    count = int((inputs["input_ids"] == tokenizer.convert_tokens_to_ids("<image>")).sum())
    found[name] = tuple(inputs["pixel_values"].shape), count
    print(name, found[name][0], "placeholders", count)
assert found["both"][1] == found["image alone"][1] + found["video alone"][1], "placeholders differ"
assert found["both"][0] == found["video alone"][0], "the image is no longer dropped"
PY
HF_HUB_OFFLINE=1 "$folder/env/bin/python" -W ignore "$folder/run.py"
echo "as described: the prompt has placeholders for the image, and its pixels are gone"
