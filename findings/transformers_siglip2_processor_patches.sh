#!/usr/bin/env bash
# transformers 5.24.0: Siglip2Processor does not use the patch size and the number of patches of the image processor inside it.
#
# A Siglip2ImageProcessor for patches of 32 x 32 pixels and at most 64 of them gives 64 patches of 3,072 numbers. Inside a
# Siglip2Processor, which is built from it and keeps it as `image_processor`, the same picture becomes 256 patches of 768 numbers: the
# processor's own defaults, `patch_size` 16 and `max_num_patches` 256, are passed with every call and come before what the image
# processor was made with. A checkpoint with other patches then gets pixels of a shape that its tower does not take, although the configuration
# file of its image processor is right; `images_kwargs` in the call help.
#
# Seen with torch 2.14.1, torchvision 0.29.1, transformers 5.24.0:
#   image processor (1, 64, 3072)
#   processor around it (1, 256, 768)
#   processor, told in the call (1, 64, 3072)
# The script fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.14.1 torchvision==0.29.1 transformers==5.24.0 pillow
cat >"$folder/run.py" <<'PY'
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast, Siglip2ImageProcessor, Siglip2Processor

words = Tokenizer(WordLevel({"<unk>": 0}, unk_token="<unk>"))
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", pad_token="<pad>")
patches = {"patch_size": 32, "max_num_patches": 64}
alone = Siglip2ImageProcessor(**patches)
processor = Siglip2Processor(image_processor=alone, tokenizer=tokenizer)
assert processor.image_processor.patch_size == 32 and processor.image_processor.max_num_patches == 64
picture, found = [Image.new("RGB", (200, 120))], {}
for name, call, options in (
    ("image processor", alone, {}),
    ("processor around it", processor, {}),
    ("processor, told in the call", processor, {"images_kwargs": patches}),
):
    found[name] = tuple(call(images=picture, return_tensors="pt", **options)["pixel_values"].shape)
    print(name, found[name])
assert found["image processor"] == found["processor, told in the call"] == (1, 64, 3072)
assert found["processor around it"] == (1, 256, 768), "the processor uses its image processor's values now"
PY
HF_HUB_OFFLINE=1 "$folder/env/bin/python" -W ignore "$folder/run.py"
echo "as described: the processor's own defaults come before its image processor's values"
