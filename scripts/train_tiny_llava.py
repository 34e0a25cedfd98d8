"""Train the embedded LLaVA: `vlm-prune train-tiny llava`.

python scripts/train_tiny_llava.py FOLDER --bf16 --install
"""

from vlm_prune.benchmarks.cli.app import run_script

if __name__ == "__main__":
    run_script("train-tiny", "llava")
