"""Tests in `engine` start vLLM, so they are collected only where it is installed."""

from importlib.util import find_spec

collect_ignore = [] if find_spec("vllm") else ["engine"]
