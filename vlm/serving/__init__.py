"""Pruning inside vLLM; nothing here imports vLLM before it is needed."""
