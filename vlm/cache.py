"""The cache argument of decoders, which transformers 5.24 renamed."""

from collections.abc import Mapping
from inspect import signature
from typing import Any

from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask

NAMES = ("cache", "past_key_values")
"""What callers may say: the name since transformers 5.24 and the one before."""
CACHE = next(name for name in NAMES if name in signature(create_causal_mask).parameters)
"""What the installed transformers calls it."""


def cache_of(kwargs: Mapping[str, Any]) -> Cache | None:
    """The cache among a forward's keyword arguments, under either name; None if there is none."""
    return next((kwargs[name] for name in NAMES if kwargs.get(name) is not None), None)
