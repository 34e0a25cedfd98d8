"""What an adapter says about a model family: where its parts are, and what it lacks."""

import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from threading import get_ident
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from vlm_prune.vlm.attention import scored_query_key
from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.cost import tower_flops
from vlm_prune.vlm.encoded import Images
from vlm_prune.vlm.smaller import GridOf, Smaller

Need = Literal[
    "a two-layer projector",
    "a nonlinear projector (a linear one is equally sensitive to all tokens)",
    "a fixed image size",
    "a tower that takes smaller images",
    "videos",
    "softmax attention in every decoder layer",
    "decoder layers with keys and values, and no inputs but hidden states, of their own",
]
MAX_RESIZED_PIXELS = 16_000_000
Kind = Literal["image", "video"]
KINDS: tuple[Kind, ...] = ("image", "video")
PIXELS: dict[Kind, str] = {"image": "pixel_values", "video": "pixel_values_videos"}


def seed_of(pixels: Tensor) -> int:
    """Returns a number that depends on the pixels of one image alone."""
    return zlib.crc32(pixels.float().cpu().numpy().tobytes())


def patched(pixels: Tensor, side: int) -> Tensor:
    """Cuts images (M, C, H, W) into squares in reading order, (M, S, C x side x side).

    What is left at the right and at the bottom is no square.
    """
    rows, columns = (edge // side for edge in pixels.shape[-2:])
    grid = pixels[..., : rows * side, : columns * side]
    grid = grid.unflatten(-1, (columns, side)).unflatten(-3, (rows, side))
    patches: Tensor = grid.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
    return patches


def image_blocks(is_image: Tensor, length: int) -> Tensor:
    """Returns the number of the unbroken run of image tokens that each of the last tokens is in,
    (B, L) -> (B, `length`), -1 for other tokens, on the CPU.
    """
    is_image = is_image.cpu()
    # a run starts where the token before is of no image
    starts = is_image & ~torch.nn.functional.pad(is_image, (1, 0))[:, :-1]
    return torch.where(is_image, starts.cumsum(1) - 1, -1)[:, -length:]


def matrices(module: nn.Module) -> int:
    """Returns the weights of a module's matrix products, however they are stored."""
    total = 0
    for part in module.modules():
        if isinstance(part, nn.Linear):
            total += part.in_features * part.out_features
        else:
            total += sum(
                parameter.numel()
                for parameter in part.parameters(recurse=False)
                if parameter.ndim > 1
            )
    return total


def check_strategy(config: Any, prefix: int) -> None:
    """Refuses a model whose image tokens are not the patches of its tower, each one once.

    Args:
        config: of the model.
        prefix: tokens that the tower puts in front of patches: 1 with a CLS token.

    Raises:
        InputError: if a CLS token is among its image tokens, or a patch is left out for one.
    """
    found, right = config.vision_feature_select_strategy, "default" if prefix else "full"
    if found != right:
        wrong = "shows the CLS token as an image token" if prefix else "leaves the first patch out"
        raise InputError(
            f"vision_feature_select_strategy {found!r} {wrong} on a {config.vision_config.model_type}, "
            f"which is not supported; {right!r} is"
        )


@contextmanager
def noted(layer: nn.Module) -> Iterator[dict[str, Any]]:
    """Notes what a layer gets in this thread while open: its input, and
    rotation where there is one.

    Raises:
        InputError: when the layer has not been called through its hooks, as in a compiled tower.
    """
    seen: dict[str, Any] = {}
    thread = get_ident()

    def note(_: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if get_ident() == thread:
            seen.update(hidden_states=args[0], rotary=kwargs.get("position_embeddings"))

    hook = layer.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield seen
    finally:
        hook.remove()
    if not seen:
        raise InputError(
            "a compiled vision tower runs without the hook that reads it; undo compile() on it"
        )


@contextmanager
def outputs_of(*modules: nn.Module) -> Iterator[list[Tensor | None]]:
    """Notes what modules give in this thread while open, in their order.

    It is None for one that is not called through its hooks, or more than once.
    """
    outputs: list[Tensor | None] = [None] * len(modules)
    calls, thread = [0] * len(modules), get_ident()

    def note(number: int, module: Any, args: Any, output: Any) -> None:
        if get_ident() == thread:
            calls[number] += 1
            outputs[number] = output.detach() if calls[number] == 1 else None

    hooks = [
        module.register_forward_hook(partial(note, number)) for number, module in enumerate(modules)
    ]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


def compute_device(model: Any) -> torch.device:
    """Returns where a model computes. Weights that accelerate has offloaded are on no device: its
    hooks bring them to theirs.
    """
    if model.device.type == "meta":
        for module in model.modules():
            hook = getattr(module, "_hf_hook", None)
            for part in (hook, *getattr(hook, "hooks", ())):
                if getattr(part, "execution_device", None) is not None:
                    return torch.device(part.execution_device)
    device: torch.device = model.device
    return device


def loaded(module: nn.Module) -> AbstractContextManager[None]:
    """Brings a module's own parameters to where it computes, if accelerate has offloaded them.

    Its hooks do so for a module that is called, not for one whose parameters are read.
    """
    if not hasattr(module, "_hf_hook"):
        return nullcontext()
    from accelerate.utils import align_module_device

    context: AbstractContextManager[None] = align_module_device(module)
    return context


@dataclass(frozen=True)
class Family(ABC):
    """Paths into a model of one family.

    `lacks` names what some methods need and the family has not; `kinds` what its models encode,
    `KINDS` where that includes videos; `frames_as_images` whether frames of a video are images to its
    models; `image_inputs` the arguments of a
    prompt, next to `pixel_values`, that describe its images, `video_inputs` those next to
    `pixel_values_videos`; `mrope` whether positions have rows
    for time, height and width, which leave gaps when tokens go; `by_row` whether the processor
    takes the images of each prompt apart; `both_ways` in which kinds of decoder layers the tokens
    of an image attend to each other both ways; `row_breaks` whether text between an image's
    placeholders ends its rows, and goes with the last token of its row.
    """

    model: Any

    lacks: ClassVar[frozenset[Need]] = frozenset()
    kinds: ClassVar[tuple[Kind, ...]] = ("image",)
    frames_as_images: ClassVar[bool] = False
    image_inputs: ClassVar[tuple[str, ...]] = ()
    video_inputs: ClassVar[tuple[str, ...]] = ()
    mrope: ClassVar[bool] = False
    by_row: ClassVar[bool] = False
    both_ways: ClassVar[tuple[str, ...]] = ()
    row_breaks: ClassVar[bool] = False

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        videos: frozenset[Need] = frozenset({"videos"})
        takes = "video" in cls.kinds or cls.frames_as_images
        cls.lacks = cls.lacks - videos if takes else cls.lacks | videos

    @property
    def device(self) -> torch.device:
        """Returns the device where the model computes."""
        return compute_device(self.model)

    @property
    def fixed_size(self) -> bool:
        """Returns whether every image has the same number of tokens."""
        return "a fixed image size" not in self.lacks

    @property
    def image_token(self) -> int:
        """Returns the id of an image token's placeholder."""
        return int(self.model.config.image_token_id)

    @property
    def video_token(self) -> int:
        """Returns the id of a video token's placeholder, in families that take videos."""
        return int(self.model.config.video_token_id)

    def placeholder(self, kind: Kind) -> int:
        """Returns the id of the placeholder of an image's or a video's token."""
        return self.image_token if kind == "image" else self.video_token

    def kind_of(self, frames: int) -> Kind:
        """Returns as what the model encodes a video of so many frames, or an image, of 0."""
        return "video" if frames and "video" in self.kinds else "image"

    def frame_lines(
        self, input_ids: Tensor, ordinal: Tensor, frames: Sequence[int]
    ) -> Tensor | None:
        """Returns for each token of a prompt with videos the frame that it goes with,
        (B, L); -1 for other tokens.

        A frame's tokens, its time stamp and its markers go with it. None where frames have no
        markers, as here.

        Args:
            input_ids: (B, L).
            ordinal: the image or video of each placeholder, -1 for text, (B, L).
            frames: of each video, 0 for images.
        """
        return None

    @property
    @abstractmethod
    def tokens_per_image(self) -> int:
        """Returns how many tokens an image of the tower's own size has, or one
        tile where images have several.
        """

    @property
    def multimodal(self) -> nn.Module:
        """Returns the module that merges image features into the embeddings."""
        module: nn.Module = self.model.model
        return module

    @property
    def decoder(self) -> Any:
        """Returns the language model, with `.layers`, `.rotary_emb` and `.config`."""
        return self.model.model.language_model

    @property
    def last_cut(self) -> int:
        """Returns how many decoder layers can have run at most when
        tokens are dropped between them.
        """
        return len(self.decoder.layers) - 1

    @property
    @abstractmethod
    def tower_layers(self) -> Any:
        """Returns the vision tower's layers."""

    @property
    def view_tower(self) -> nn.Module | None:
        """Returns the vision tower, where it takes views (T, 3, H, W) that do not see each other."""
        return None

    @property
    def tower_prefix(self) -> int:
        """Returns how many tokens of the tower's sequence stand in front of a view's patches."""
        return 0

    @property
    @abstractmethod
    def projector(self) -> Callable[[Tensor], Tensor]:
        """Returns the map from `VisionTokens.features` to `.projected`."""

    def encoder_output(self, kind: Kind, pixel_values: Tensor, **inputs: Any) -> Any:
        """Returns what the model's `get_image_features` or `get_video_features` does, which no hook
        on its forward sees.

        Args:
            kind: of what is encoded.
            pixel_values: as the processor gives them.
            inputs: other arguments of that method.
        """
        module: Any = self.multimodal
        with loaded(module):
            return getattr(module, f"get_{kind}_features")(pixel_values, **inputs)

    def run(self, encoder: Callable[..., Any], pixel_values: Tensor, **inputs: Any) -> Any:
        """Returns the output of tower and projector, with all that `images` reads of it.

        Its `projections` are what `scored_projections` gave, or None where hooks did not see it.

        Args:
            encoder: the model's `get_image_features` or `get_video_features`.
            pixel_values: as the processor gives them.
            inputs: other arguments of `encoder`.
        """
        options = {"output_hidden_states": True, "return_dict": True}
        with outputs_of(*self.scored_projections) as projections:
            output = encoder(pixel_values, **inputs | options)
        states, read = output.hidden_states, self.states_read
        seen = tuple(part for part in projections if part is not None)
        output.projections = seen if seen and len(seen) == len(projections) else None
        if output.projections is None:
            read = *read, *self.scored_states
        numbers = {number % len(states) for number in read}
        output.hidden_states = tuple(
            state if number in numbers else None for number, state in enumerate(states)
        )
        return output

    @property
    def states_read(self) -> tuple[int, ...]:
        """Returns the numbers of the tower's hidden states that features
        are made of; others are let go.
        """
        return ()

    @property
    def scored_layer(self) -> int | None:
        """Returns the number of the tower's layer whose attention methods read, -1 for the last; None
        where a family finds queries and keys in its own way.
        """
        return None

    @property
    def scored_states(self) -> tuple[int, ...]:
        """Returns the number of the hidden state that the scored layer gets."""
        layer = self.scored_layer
        return () if layer is None else (layer % len(self.tower_layers),)

    @property
    def scored_projections(self) -> tuple[nn.Module, ...]:
        """Returns the modules that make queries and keys in the scored layer,
        to be seen as the tower runs.
        """
        if self.scored_layer is None:
            return ()
        layer = self.tower_layers[self.scored_layer]
        attention = layer.self_attn if hasattr(layer, "self_attn") else layer.attention
        return attention.q_proj, attention.k_proj

    @torch.no_grad()
    def tower_query_key(
        self, output: Any, rows: slice | list[int] = slice(None)
    ) -> tuple[Tensor, Tensor]:
        """Returns queries and keys (M, H, N, d) of the scored layer.

        Args:
            output: of `run`.
            rows: which images or tiles.
        """
        assert self.scored_layer is not None
        (state,) = self.scored_states
        return scored_query_key(self.tower_layers[self.scored_layer], output, state, rows)

    @abstractmethod
    def images(self, output: Any, pixel_values: Tensor, **inputs: Tensor) -> Images:
        """Returns the images of a prompt, given what `run` gave for them and the same arguments.

        Args:
            output: of `run`.
            pixel_values: as the processor gives them.
            inputs: those of `image_inputs`, and `input_ids`.
        """

    def videos(self, output: Any, pixel_values: Tensor, **inputs: Tensor) -> Images:
        """Returns the videos of a prompt, given what `run` gave for them and the same arguments.

        Args:
            output: of `run`.
            pixel_values: as the processor gives them.
            inputs: those of `video_inputs`, and `input_ids`.
        """
        raise InputError(f"videos of {self.model.config.model_type} models are not pruned")

    def smaller(
        self, kind: Kind, pixel_values: Tensor, inputs: Mapping[str, Any], grid_of: GridOf
    ) -> Smaller | None:
        """Returns images or videos that are shrunk before the tower; None where they stay whole, as
        here.

        Args:
            kind: what they are.
            pixel_values: as the processor gives them.
            inputs: those of `image_inputs` or `video_inputs`.
            grid_of: says how many tokens each is to have.
        """
        return None

    def encode(
        self,
        pixel_values: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        **inputs: Tensor,
    ) -> Images:
        """Runs tower and projector on a prompt's images and videos.

        Args:
            pixel_values: of the images, as the processor gives them.
            pixel_values_videos: of the videos, likewise.
            inputs: those of `image_inputs` and `video_inputs`, `input_ids`, and `video_frames` where
                frames are images.
        """
        encoded = Images([])
        if pixel_values is not None:
            output = self._encoded("image", pixel_values, self.image_inputs, inputs)
            encoded = self.images(output, pixel_values, **inputs)
        if pixel_values_videos is not None:
            output = self._encoded("video", pixel_values_videos, self.video_inputs, inputs)
            encoded = encoded.followed_by(self.videos(output, pixel_values_videos, **inputs))
        return encoded

    def video_grids(self, inputs: Mapping[str, Any]) -> list[tuple[int, int, int]]:
        """Returns frames, rows and columns of each video's tokens.

        Args:
            inputs: what the processor gives.
        """
        raise InputError(f"videos of {self.model.config.model_type} models are not pruned")

    @property
    def tokens_per_frame(self) -> int | None:
        """Returns how many tokens each frame of a video has; None where that depends on its size."""
        return None

    def _encoded(
        self, kind: Kind, pixels: Tensor, names: tuple[str, ...], inputs: Mapping[str, Tensor]
    ) -> Any:
        given = {name: inputs[name] for name in names if inputs.get(name) is not None}
        return self.run(partial(self.encoder_output, kind), pixels.to(self.device), **given)

    def tower_flops(self, views: Sequence[int]) -> float:
        """Returns the matrix-product FLOPs of the tower on an image, given the
        number of patches of each of its views.
        """
        tokens = [patches + self.tower_prefix for patches in views]
        layers = [(matrices(layer), tokens) for layer in self.tower_layers]
        width = self.model.config.vision_config.hidden_size
        return tower_flops(width, sum(views), self.patch_embedding, layers)

    @property
    def patch_convolution(self) -> Any:
        """Returns the layer that turns patches of pixels into hidden states:
        the model's only convolution.
        """
        convolutions = nn.Conv2d | nn.Conv3d
        return next(m for m in self.multimodal.modules() if isinstance(m, convolutions))

    @property
    def patch_embedding(self) -> int:
        """Returns how many weights turn a patch into a hidden state."""
        return matrices(self.patch_convolution)

    @property
    def patch_size(self) -> int:
        """Returns the side of a patch in pixels."""
        return int(self.patch_convolution.kernel_size[-1])

    def check_size(self, image_processor: Any, width: int, height: int) -> None:
        """Refuses a picture that the processor would make too large on its way to the tower.

        Where images have a fixed size, the shorter edge is scaled to it and the rest cropped
        afterward. Other families' processors limit the pixels or tiles of any picture themselves.

        Args:
            image_processor: of the model.
            width: of the picture in pixels.
            height: of the picture in pixels.

        Raises:
            InputError: if the picture would have more than 16 million pixels then.
        """
        size = getattr(image_processor, "size", None) or {}
        edge = size.get("shortest_edge")
        if not self.fixed_size or edge is None or size.get("longest_edge") is not None:
            return
        scale = edge / min(width, height)
        if scale * width * scale * height > MAX_RESIZED_PIXELS:
            raise InputError(
                f"an image of {width} x {height} becomes {scale * width:.0f} x {scale * height:.0f} "
                f"for this model, above {MAX_RESIZED_PIXELS // 10**6} million pixels; crop it"
            )

    def counts(
        self, input_ids: Tensor, inputs: Mapping[str, Any], kind: Kind = "image"
    ) -> list[int]:
        """Returns the number of placeholders of each image or video of an unpruned prompt.

        Args:
            input_ids: (B, L).
            inputs: what the forward is given; videos are encoded beforehand.
            kind: of what is counted.
        """
        encoded = (inputs.get("mm_encoder_outputs") or {}).get(kind)
        if encoded is not None:
            return [len(features) for features in encoded.pooler_output]
        if kind == "video" or inputs.get("pixel_values") is None:
            return []
        return self.sizes(input_ids, inputs)

    def sizes(self, input_ids: Tensor, inputs: Mapping[str, Any]) -> list[int]:
        """Returns the number of placeholders of each image, given pixels; by
        default all have equally many.
        """
        images = len(inputs["pixel_values"])
        return [int((input_ids == self.image_token).sum()) // images] * images

    def item_sizes(
        self, input_ids: Tensor, inputs: Mapping[str, Any]
    ) -> tuple[list[int], list[int]]:
        """Returns the number of placeholders of each image, or video of images, and of its frames, 0
        for images.

        Args:
            input_ids: (B, L).
            inputs: what the forward is given, with `video_frames` where frames are images.
        """
        sizes = self.sizes(input_ids, inputs)
        return sizes, [0] * len(sizes)

    def positions(self, input_ids: Tensor, valid: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        """Returns positions in the full prompt, (B, L), or (4, B, L) with those of the text first.

        Args:
            input_ids: (B, L).
            valid: which tokens are no padding, (B, L).
            inputs: those of `image_inputs` and `video_inputs`.
        """
        return valid.cumsum(1) - 1

    def arguments(
        self, input_ids: Tensor, valid: Tensor, inputs: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Returns what a forward needs beside ids, mask and encoded images to treat these as images.

        Args:
            input_ids: (B, L).
            valid: which tokens are no padding, (B, L).
            inputs: those of `image_inputs`.
        """
        return (
            {"position_ids": self.positions(input_ids, valid, inputs) * valid} if self.mrope else {}
        )

    def blocks(self, inputs: Mapping[str, Any], length: int) -> Tensor | None:
        """Returns numbers of the tokens that attend to each other both ways, (B, L);
        None where there are none, as here.

        Args:
            inputs: arguments of the forward.
            length: of its tokens, of which the arguments may describe more: those before.
        """
        return None

    def output(
        self, features: Sequence[Tensor], deepstack: Sequence[list[Tensor]] = ()
    ) -> dict[str, Any]:
        """Returns encoded images as `generate(mm_encoder_outputs=...)`
        takes them; new for each call.
        """
        return {"image": BaseModelOutputWithPooling(pooler_output=list(features))}

    def outputs(self, encoded: Images) -> dict[str, Any]:
        """Returns encoded images and videos as `generate(mm_encoder_outputs=...)` takes them."""
        projected, deepstack = encoded.projected, encoded.deepstack
        found: dict[str, Any] = {}
        for kind in self.kinds:
            members = [n for n, frames in enumerate(encoded.frames) if self.kind_of(frames) == kind]
            if members:
                layers = [[layer[n] for n in members] for layer in deepstack]
                output = self.output([projected[n] for n in members], layers)["image"]
                found[kind] = output if kind == "image" else self.video_output(output)
        return found

    def video_output(self, output: Any) -> Any:
        """Returns what `output` makes of videos, as the model takes it for them."""
        return output
