"""Train the embedded LLaVA over SmolLM2: `vlm-prune train-tiny smol`.

python scripts/train_smol_llava.py FOLDER --install
"""

from vlm_prune.benchmarks.cli.app import run_script

if __name__ == "__main__":
    run_script("train-tiny", "smol")
