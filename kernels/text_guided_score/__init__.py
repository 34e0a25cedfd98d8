from vlm_prune.kernels.text_guided_score.op import text_guided_score

__all__ = ["text_guided_score"]
