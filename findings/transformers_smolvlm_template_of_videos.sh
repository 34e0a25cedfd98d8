#!/usr/bin/env bash
# transformers 5.24.0: SmolVLM's processor ignores its own chat template as soon as one conversation of a call has a video.
#
# `apply_chat_template` then takes a template that is written into the library, unless the call names one, so that a model that was
# trained with another template, which its checkpoint holds, gets prompts with videos in a form that it was not trained on.
# This goes for the whole call: a conversation about an image is written differently alone and beside one about a video.
# No warning is given. `chat_template=processor.chat_template` in the call helps.
#
# Seen with torch 2.14.1, torchvision 0.29.1, transformers 5.24.0:
#   image: '[user] <image>Is it red?[assistant]'
#   video: '<|im_start|>User: <video>Is it red?<end_of_utterance>\nAssistant:'
#   image, beside a video: '<|im_start|>User:<image>Is it red?<end_of_utterance>\nAssistant:'
#   video, template named in the call: '[user] <video>Is it red?[assistant]'
# The script fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.14.1 torchvision==0.29.1 transformers==5.24.0 num2words==0.5.14 pillow
cat >"$folder/run.py" <<'PY'
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast, SmolVLMImageProcessor, SmolVLMProcessor, SmolVLMVideoProcessor

tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=Tokenizer(WordLevel({"<unk>": 0}, unk_token="<unk>")), unk_token="<unk>", pad_token="<pad>"
)
template = (
    "{% for message in messages %}[{{ message['role'] }}] {% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% else %}<{{ part['type'] }}>{% endif %}"
    "{% endfor %}{% endfor %}[assistant]"
)
processor = SmolVLMProcessor(
    SmolVLMImageProcessor(), tokenizer, SmolVLMVideoProcessor(), image_seq_len=9, chat_template=template
)
chats = {
    kind: [{"role": "user", "content": [{"type": kind}, {"type": "text", "text": "Is it red?"}]}]
    for kind in ("image", "video")
}
options = {"add_generation_prompt": True}
found = {kind: processor.apply_chat_template(chat, **options) for kind, chat in chats.items()}
found["image, beside a video"], beside = processor.apply_chat_template(list(chats.values()), **options)
found["video, template named in the call"] = processor.apply_chat_template(chats["video"], chat_template=template)
for name, text in found.items():
    print(f"{name}: {text!r}")
assert processor.chat_template == template
assert found["image"] == "[user] <image>Is it red?[assistant]"
assert found["video, template named in the call"] == "[user] <video>Is it red?[assistant]"
assert found["video"] == beside == "<|im_start|>User: <video>Is it red?<end_of_utterance>\nAssistant:", "the behavior has changed"
assert found["image, beside a video"].startswith("<|im_start|>User:<image>"), "the behavior has changed"
PY
HF_HUB_OFFLINE=1 "$folder/env/bin/python" -W ignore "$folder/run.py"
echo "as described: a video puts the built-in template in place of the processor's"
