"""Measure this tree beside another commit, in turn: `vlm-prune bench-against`.

python scripts/bench_against.py 35ba04c --run "eval --method zoo --budget 64" --output against.json
"""

from vlm_prune.benchmarks.cli.app import run_script

if __name__ == "__main__":
    run_script("bench-against")
