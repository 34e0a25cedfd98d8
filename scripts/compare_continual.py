"""Compare all continual learners on an embedded stream: `vlm-prune continual compare`.

python scripts/compare_continual.py runs/continual --seeds 3
python scripts/compare_continual.py runs/redrawn --stream redrawn --search-from runs/continual
"""

from vlm_prune.benchmarks.cli.app import run_script

if __name__ == "__main__":
    run_script("continual", "compare")
