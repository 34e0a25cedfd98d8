"""Measure our methods beside the released code of others, in turn: `vlm-prune bench-peers`.

python scripts/bench_peers.py peers/bin/python --output peers.json
"""

from vlm_prune.benchmarks.cli.app import run_script

if __name__ == "__main__":
    run_script("bench-peers")
