"""Train the text-only base of the experiment `forgetting`: `vlm-prune train-tiny text`.

python scripts/train_tiny_text.py FOLDER --bf16 --install
"""

from vlm_prune.benchmarks.cli.app import run_script

if __name__ == "__main__":
    run_script("train-tiny", "text")
