from vlm_prune.kernels.attention_received.op import attention_received

__all__ = ["attention_received"]
