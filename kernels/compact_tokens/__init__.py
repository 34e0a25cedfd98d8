from vlm_prune.kernels.compact_tokens.op import compact_tokens

__all__ = ["compact_tokens"]
