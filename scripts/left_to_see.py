"""Which questions about videos kept tokens still answer: `vlm-prune left-to-see OUT.md`.

python scripts/left_to_see.py left.md
"""

from vlm_prune.benchmarks.cli.app import run_script

if __name__ == "__main__":
    run_script("left-to-see")
