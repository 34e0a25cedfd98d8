from vlm_prune.kernels.pairwise_cosine.op import pairwise_cosine

__all__ = ["pairwise_cosine"]
