from vlm_prune.kernels.token_sensitivity.op import (
    closed_form,
    directional,
    monte_carlo,
    weight_kernel,
    weight_root,
)

__all__ = ["closed_form", "directional", "monte_carlo", "weight_kernel", "weight_root"]
