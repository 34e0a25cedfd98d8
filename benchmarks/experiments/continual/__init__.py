"""Continual CLIP measured: one run with its report, and all methods against each other."""
