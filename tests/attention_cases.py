"""Every registered method of sparse attention, with the arguments it is tested with on short prompts."""

from vlm_prune.pruning.attention import ATTENTION, BlockAttention, build_attention

BLOCK, TAIL = 8, 4
SHORT = {"block": BLOCK, "tail": TAIL, "minimum": 1}
ARGUMENTS = {
    "local": {"window": 16},
    "power": {"window": 8},
    "s2": {"window": 8, "stride": 3},
    "anchor": {"step": 2, "theta": 2.5},
    "xattention": {"stride": 4, "mass": 0.7},
    "pooled": {"mass": 0.7},
    "sale": {"threshold": 0.05},
    "prism": {"mass": 0.7},
    "hip": {"keys": 7},
    "own-frame": {"window": 8, "previous": 1},
    "dhsa": {"keys": 16},
}
PREFILL = [name for name in ATTENTION if issubclass(ATTENTION[name], BlockAttention)]
RULES = [name for name in PREFILL if ATTENTION[name].choose is not BlockAttention.choose]


def short(name, **more):
    """A method with blocks of eight tokens, on prompts of any length."""
    return build_attention(name, **SHORT | ARGUMENTS.get(name, {}) | more)
