from vlm_prune.kernels.greedy_select.op import greedy_select

__all__ = ["greedy_select"]
