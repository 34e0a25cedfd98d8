"""Conversations out of lmms-eval's requests, in chat and in simple mode."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lmms_eval.api.instance import Instance
from PIL import Image

from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.common.images import open_image
from vlm_prune.vlm.common.video import is_video

NEW_TOKENS = 1024
# What `generate` takes; tasks also carry options of single models, such as image_aspect_ratio.
PASSED = ("max_new_tokens", "num_beams", "do_sample", "temperature", "top_p", "top_k")


@dataclass(frozen=True)
class Chat:
    """A conversation whose parts are lmms-eval's: {"type": "text" | "image" | "video", ...}."""

    turns: list[dict[str, Any]]

    @property
    def question(self) -> str:
        """Returns the text of the last turn."""
        parts = self.turns[-1]["content"]
        return "".join(part["text"] for part in parts if part["type"] == "text")

    def shows(self, kind: str) -> list[Any]:
        """Returns what its parts of a kind, `image` or `video`, show, unopened."""
        return [
            part["url"] for turn in self.turns for part in turn["content"] if part["type"] == kind
        ]

    def images(self) -> list[Image.Image]:
        return [open_image(image) for image in self.shows("image")]

    def videos(self) -> list[str]:
        """Returns the names of the video files."""
        return self.shows("video")

    def messages(self) -> list[dict[str, Any]]:
        """Returns the turns for a chat template, which takes images as parts without content."""
        return [
            {"role": turn["role"], "content": [_part(part) for part in turn["content"]]}
            for turn in self.turns
        ]


def _part(part: dict[str, Any]) -> dict[str, Any]:
    if part["type"] in ("image", "video"):
        return {"type": part["type"]}
    return {"type": "text", "text": part["text"]}


def user_turn(visuals: Any, text: str) -> Chat:
    """Returns one question about images."""
    content = [
        {"type": "video" if is_video(visual) else "image", "url": visual}
        for visual in visuals or []
    ]
    return conversation([{"role": "user", "content": [*content, {"type": "text", "text": text}]}])


def conversation(turns: list[dict[str, Any]]) -> Chat:
    """Returns a task's messages as a chat.

    Raises:
        InputError: if they show something else than images, video files and text.
    """
    for turn in turns:
        if isinstance(turn["content"], str):
            turn["content"] = [{"type": "text", "text": turn["content"]}]
        for part in turn["content"]:
            shown = part.get("url", part.get("image"))
            still = part["type"] == "image" and isinstance(shown, str | Image.Image)
            moving = part["type"] == "video" and is_video(part.get("url"))
            if part["type"] != "text" and not still and not moving:
                kind = part["type"] if part["type"] != "image" else type(shown).__name__
                raise InputError(f"the task shows {kind}s; give a task of images, videos or text")
            if still:
                part["url"] = shown
    return Chat(turns)


def chat_of(request: Instance, documents: dict[str, Any]) -> tuple[Chat, Any]:
    """Returns the conversation of a request and what comes with it:
    options, or the text to score.
    """
    first, second, *rest = request.args
    if not rest:  # a choice without its question
        return user_turn([], first), second
    visual, number, task, split = rest
    document = documents[task][split][number]
    if callable(second) and isinstance(visual, dict):  # chat mode
        return conversation(second(document)), visual
    visuals = visual(document) if visual is not None else []
    return user_turn(visuals, first), second(document) if callable(second) else second


@dataclass
class Rounds:
    """A talk of several rounds; `step` gives the next one from the answers so far."""

    step: Callable[[int, list[str], Any], tuple[Chat | None, Any]]
    options: dict[str, Any]
    state: Any = None

    def ask(self, number: int, answers: list[str]) -> Chat | None:
        """Returns the question of round `number`, None when the talk is over."""
        chat, self.state = self.step(number, list(answers), self.state)
        return chat


def rounds_of(request: Instance, documents: dict[str, Any]) -> Rounds:
    """Returns the rounds of a request, in lmms-eval's protocol of either mode."""
    arguments = request.args
    *_, number, task, split = arguments
    document = documents[task][split][number]
    if isinstance(arguments[2], dict):  # chat mode
        messages, options = arguments[1], arguments[2]

        def by_messages(number: int, answers: list[str], state: Any) -> tuple[Chat | None, Any]:
            if number == 0:
                return conversation(messages(document)), None
            found = messages(
                document, round_idx=number, previous_output=answers, previous_round_info=state
            )
            if not isinstance(found, tuple) or len(found) != 4 or found[1]:
                return None, None
            return conversation(found[0]), found[3]

        return Rounds(by_messages, options)
    context, options, visuals, text = arguments[:4]

    def by_text(number: int, answers: list[str], state: Any) -> tuple[Chat | None, Any]:
        if number == 0:
            return user_turn(visuals(document), context), None
        found = text(document, round_idx=number, previous_output=answers, previous_round_info=state)
        if not isinstance(found, tuple) or len(found) != 5 or found[2]:
            return None, None
        return user_turn(found[0], found[1]), found[4]

    return Rounds(by_text, options)


def stops_of(options: dict[str, Any]) -> tuple[str, ...]:
    """Returns the texts that end a reply in simple mode, as lmms-eval's own classes have them.

    Those end no reply at a blank line, which a task gets that names no stop, and in chat mode they
    end it nowhere.
    """
    until = options.get("until") or []
    return tuple(text for text in ([until] if isinstance(until, str) else until) if text != "\n\n")


def shared_options(options: dict[str, Any]) -> dict[str, Any]:
    """Returns a task's generation arguments as `generate` takes them."""
    kept = {key: options[key] for key in PASSED if options.get(key) is not None}
    kept.setdefault("max_new_tokens", options.get("max_gen_toks", NEW_TOKENS))
    if kept.get("temperature", 0) > 0 and kept.get("do_sample", True):
        kept["do_sample"] = True
    else:
        kept = {key: kept[key] for key in kept if key not in ("temperature", "top_p", "top_k")}
        kept["do_sample"] = False
    return kept
