"""Time the kernels on a CUDA device: `vlm-prune bench-kernels`.

python scripts/bench_kernels.py OUT --dtype bfloat16
"""

from vlm_prune.benchmarks.cli.app import run_script

if __name__ == "__main__":
    run_script("bench-kernels")
