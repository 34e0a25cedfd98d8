from vlm_prune.kernels.lorra_attention.op import lorra_attention

__all__ = ["lorra_attention"]
