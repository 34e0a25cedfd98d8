"""A page to try methods on: one question, answered with and without pruning, side by side."""

import os
import threading
from contextlib import suppress
from dataclasses import asdict, dataclass
from html import escape
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from vlm_prune.benchmarks.evaluation.prompts import Prompts, make_prompts
from vlm_prune.benchmarks.evaluation.records import Variant
from vlm_prune.benchmarks.evaluation.tables import THREE_WAYS, three_ways
from vlm_prune.benchmarks.evaluation.timing import timed_generate
from vlm_prune.benchmarks.report.gallery import whole_picture
from vlm_prune.benchmarks.report.overlay import contact_sheet, frame_sheet, kept_overlay
from vlm_prune.benchmarks.speed.bench import PHASES
from vlm_prune.benchmarks.stats.table import as_markdown
from vlm_prune.benchmarks.tasks import TASKS
from vlm_prune.pruning.registry import methods
from vlm_prune.vlm.budget import parse_budget
from vlm_prune.vlm.chat import render
from vlm_prune.vlm.common.address import check_address
from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.common.video import VideoClip, open_visual
from vlm_prune.vlm.families import family_of
from vlm_prune.vlm.load import load
from vlm_prune.vlm.trace import Trace

INSTALL = "pip install 'vlm-prune[demo]'"
EXAMPLES = (("attribute", 1), ("ocr", 4), ("count", 2), ("relation", 3))
NEW_TOKENS = 128
LONGEST = 2000
FRAMES = 32
"""Of a video, at most."""
CaptionedImages = list[tuple[Image.Image, str]]


@dataclass(frozen=True)
class Comparison:
    """Both answers, the kept tokens on the picture, or on a video's frames, with a caption each, and a
    table in Markdown.
    """

    unpruned: str
    pruned: str
    kept: CaptionedImages
    times: str


class Comparer:
    """Answers a question about an image or a video with the unpruned and with a pruned model.

    Args:
        model: of a supported family.
        processor: the model's.

    Raises:
        InputError: if the model is of no supported family.
    """

    def __init__(self, model: Any, processor: Any) -> None:
        self.model, self.processor, self.family = model, processor, family_of(model)
        self._warm: set[tuple[str, str]] = set()

    @property
    def methods(self) -> list[str]:
        """Returns the names of the methods that go with the model's images or videos."""
        layers, lacks = len(self.family.decoder.layers), self.family.lacks
        return [name for name, method in methods().items() if not method().needs_on(layers) & lacks]

    @torch.inference_mode()
    def __call__(
        self, image: str | Path | None, question: str, method: str, budget: str
    ) -> Comparison:
        """Returns the answer with and without pruning; times are those of this one question, after
        one warm-up of each method on images, and on videos.

        Args:
            image: an image file, or a video file, of which 32 frames are read.
            question: about it.
            method: name of a method.
            budget: tokens per image or video or a fraction, as text.

        Raises:
            InputError: if one of the arguments is missing or cannot be used with the model.
        """
        if not image:
            raise InputError("there is no image; upload one, or a video, or pick an example")
        if not question.strip():
            raise InputError("there is no question; ask one about the image")
        if len(question) > LONGEST:
            raise InputError(f"the question has {len(question)} characters; at most {LONGEST}")
        pruner = Variant(method.strip(), parse_budget(budget.strip())).build(0)
        pruner.admit(self.model)
        medium = open_visual(image, FRAMES)
        kind = "video" if isinstance(medium, VideoClip) else "image"
        content = [{"type": kind}, {"type": "text", "text": question.strip()}]
        text = render(
            self.processor, [{"role": "user", "content": content}], add_generation_prompt=True
        )
        if (method, kind) not in self._warm:
            # allocations, lazy hooks and kernels are not what is timed
            self._both(self._prompts(text, medium), pruner, 1)
            self._warm.add((method, kind))
        prompts = self._prompts(text, medium)
        (unpruned, before, _), (pruned, after, trace) = self._both(prompts, pruner, NEW_TOKENS)
        assert prompts.vision is not None
        (available, *_) = prompts.vision.counts
        return Comparison(
            self._text(unpruned),
            self._text(pruned),
            self._pictures(medium, prompts, trace),
            as_markdown(
                [
                    ["ms", "unpruned", "pruned"],
                    *([p, f"{before[p]:.1f}", f"{after[p]:.1f}"] for p in PHASES),
                    ["all", *(f"{sum(times.values()):.1f}" for times in (before, after))],
                    ["answered tokens", str(len(unpruned)), str(len(pruned))],
                    [
                        f"{kind} tokens",
                        str(available),
                        three_ways(pruner.counts(available, trace.layer_tokens)),
                    ],
                ]
            ),
        )

    def _prompts(self, text: str, medium: Image.Image | VideoClip) -> Prompts:
        if isinstance(medium, VideoClip):
            return make_prompts(self.model, self.processor, [text], [[]], [[medium]])
        return make_prompts(self.model, self.processor, [text], [[medium]])

    def _both(
        self, prompts: Prompts, pruner: Any, most: int
    ) -> list[tuple[Tensor, dict[str, float], Trace]]:
        """Returns new tokens (T,), milliseconds by phase and what was
        pruned: unpruned, then pruned.

        Args:
            prompts: one.
            pruner: of the second run.
            most: new tokens, at most.
        """
        found = []
        for method in (None, pruner):
            (new,), phases, trace = timed_generate(self.model, prompts, method, max_new_tokens=most)
            seconds = asdict(phases) | {"vision": phases.vision or prompts.vision_s}
            found.append((new, {phase: 1e3 * s for phase, s in seconds.items()}, trace))
        return found

    def _text(self, tokens: Tensor) -> str:
        return str(self.processor.decode(tokens, skip_special_tokens=True)).strip()

    def _pictures(
        self, medium: Image.Image | VideoClip, prompts: Prompts, trace: Trace
    ) -> CaptionedImages:
        """Returns what is kept on the picture or the frames: what enters the language model, then every
        cut.

        Where a picture's tokens are no single grid over it, it is shown as it is.

        Args:
            medium: the picture or video.
            prompts: about it.
            trace: of the pruned run.
        """
        vision = prompts.vision
        assert vision is not None
        available, grid, video_grid = vision.counts[0], vision.grids[0], vision.video_grids[0]
        steps = [("before the language model", trace.entered)] if trace.entered else []
        steps += [(f"cut {number}", kept) for number, kept in enumerate(trace.cuts, 1)]
        captions = [f"{name}: {len(kept[0])} of {available}" for name, kept in steps]
        drawn: list[Image.Image] = []
        for _, (indices, *_) in steps:
            if isinstance(medium, VideoClip):
                assert video_grid is not None
                drawn.append(contact_sheet(medium, indices, video_grid))
            elif grid is None:
                drawn.append(medium)
            else:
                drawn.append(kept_overlay(self._seen(medium, prompts, grid), indices, grid))
        return list(zip(drawn, captions, strict=True))

    def _seen(self, picture: Image.Image, prompts: Prompts, grid: tuple[int, int]) -> Image.Image:
        """Returns what the tower sees of a picture; where its size is the picture's own, the picture."""
        if self.family.fixed_size and prompts.pixels:
            return as_seen(prompts.pixels["pixel_values"][0], self.processor.image_processor)
        return whole_picture(picture, prompts.cropped, grid)


def as_seen(pixels: Tensor, image_processor: Any) -> Image.Image:
    """Returns what the tower gets of an image, (3, H, W), as a picture again."""
    mean, deviation = (
        torch.tensor(values)[:, None, None]
        for values in (image_processor.image_mean, image_processor.image_std)
    )
    colors = (pixels.float().cpu() * deviation + mean).clamp(0, 1)
    return Image.fromarray((255 * colors).round().byte().permute(1, 2, 0).numpy())


def demo_page(compare: Comparer, name: str) -> Any:
    """Returns the Gradio page; nothing in it is loaded from another machine."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    import gradio as gr

    def refused(error: Exception, path: str | None) -> Any:
        line = str(error).splitlines()[0]
        if path:  # where an upload lies is not the reader's business
            line = line.replace(f"{Path(path).parent}{os.sep}", "")
        # the page reads the message as HTML, and it repeats what was typed
        return gr.Error(escape(line), print_exception=False)

    def show(path: str) -> tuple[Image.Image, str | None]:
        try:
            medium = open_visual(path, FRAMES)
        except InputError as error:
            raise refused(error, path) from None
        if isinstance(medium, VideoClip):
            return frame_sheet(medium), path
        return medium, None

    def answer(
        path: str | None, video: str | None, question: str, method: str | None, budget: str
    ) -> Any:
        try:
            found = compare(video or path, question, method or "", budget)
        except (InputError, torch.OutOfMemoryError) as error:
            raise refused(error, video or path) from None
        return found.unpruned, found.pruned, found.kept, found.times

    with gr.Blocks(title="vlm-prune", analytics_enabled=False) as blocks:
        gr.Markdown(f"# vlm-prune\n\nModel `{name}`, with all of its image tokens and with few.")
        with gr.Row():
            with gr.Column():
                # an upload gets here through `show`: Gradio would open hostile images itself
                image = gr.Image(
                    label="Image", type="filepath", image_mode=None, format="png",
                    interactive=False, buttons=["fullscreen"], elem_id="image",
                )  # fmt: skip
                # the file of the video whose frames are shown; a page cannot name another one
                video = gr.State(None)
                upload = gr.UploadButton(
                    "Upload an image or a video", file_types=["image", "video"]
                )
                question = gr.Textbox(label="Question", max_length=LONGEST, elem_id="question")
                with gr.Row():
                    method = gr.Dropdown(
                        compare.methods, value="zoo" if "zoo" in compare.methods else "divprune",
                        label="Method", allow_custom_value=True, info="Two joined by + cascade.",
                    )  # fmt: skip
                    budget = gr.Textbox(
                        "64" if compare.family.fixed_size else "0.11", label="Budget",
                        info="Tokens per image or video (64), or a fraction (0.11).",
                    )  # fmt: skip
                ask = gr.Button("Ask", variant="primary")
                samples = [TASKS[task].sample(index) for task, index in EXAMPLES]
                gr.Examples(
                    [[sample.images[0], sample.turns[-1].text] for sample in samples],
                    [image, question],
                    label="Test scenes",
                    fn=lambda *_: None,
                    outputs=[video],
                    run_on_click=True,
                    cache_examples=False,
                    api_visibility="private",
                )
            with gr.Column():
                with gr.Row():
                    unpruned = gr.Textbox(label="Unpruned answer", interactive=False)
                    pruned = gr.Textbox(label="Pruned answer", interactive=False)
                kept = gr.Gallery(
                    label="Kept tokens", format="png", interactive=False, buttons=["fullscreen"]
                )
                times = gr.Markdown()
                gr.Markdown(
                    f"Tokens are {THREE_WAYS}; one that averages others is drawn at one place."
                )
        upload.upload(show, upload, [image, video], api_visibility="private")
        gr.on(
            [ask.click, question.submit],
            answer,
            [image, video, question, method, budget],
            [unpruned, pruned, kept, times],
            concurrency_limit=1,  # a pruner changes the model while it acts
            api_visibility="private",
        )
    return blocks


def launch(blocks: Any, host: str, port: int) -> str:
    """Serves the page from another thread; returns its address.

    Args:
        blocks: the page.
        host: address to serve at.
        port: to serve at.

    Raises:
        InputError: if there is no serving at this host and port.
    """
    import gradio as gr

    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    try:
        _, address, _ = blocks.launch(
            server_name=host, server_port=port, share=False, quiet=True, prevent_thread_lock=True,
            inbrowser=False, footer_links=[], run_history=False, ssr_mode=False, mcp_server=False,
            pwa=False, max_file_size="100mb", theme=gr.themes.Default(**fonts),
        )  # fmt: skip
    except (OSError, ValueError) as error:
        raise InputError(
            f"cannot serve at {host}:{port} ({error}); give another --host or --port"
        ) from error
    return str(address)


def serve_demo(
    name: str, host: str, port: int, device: str, dtype: str, **loading: str | None
) -> None:
    """Loads the model and serves the page until Ctrl-C; uploads are gone afterward.

    Args:
        name: of the model: `tiny`, `smol`, a folder or a hub name.
        host: address to serve at.
        port: to serve at.
        device: a torch device.
        dtype: as for `load`.
        loading: other arguments of `load`.

    Raises:
        InputError: if gradio is not installed, the model is of no supported family, or the port is taken.
    """
    if find_spec("gradio") is None:
        raise InputError(f"the demo needs gradio: {INSTALL}")
    check_address(host, port)
    compare = Comparer(*load(name, device, dtype, **loading))
    with TemporaryDirectory(prefix="vlm-prune-demo-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        blocks = demo_page(compare, name)
        print(f"{launch(blocks, host, port)} (Ctrl-C ends it)", flush=True)
        with suppress(KeyboardInterrupt):
            threading.Event().wait()
        blocks.close()
