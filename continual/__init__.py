"""Continual learning of CLIP: absorb new domains, keep zero-shot."""
