"""Compare all continual learners on the packaged stream: `vlm-prune continual compare`.

python scripts/compare_continual.py runs/continual --seeds 3
"""

from vlm_prune.benchmarks.cli.app import run_script

if __name__ == "__main__":
    run_script("continual", "compare")
