"""Draw which tokens each method keeps: `vlm-prune draw-kept-tokens OUT.png [BUDGET]`.

python scripts/draw_kept_tokens.py OUT.png 64
"""

from vlm_prune.benchmarks.cli.app import run_script

if __name__ == "__main__":
    run_script("draw-kept-tokens")
