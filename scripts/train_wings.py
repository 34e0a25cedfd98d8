"""Train Wings or a baseline, or run an experiment: `vlm-prune train-wings`.

accelerate launch scripts/train_wings.py train --data a.json --output runs/one --preset recommended-1
python scripts/train_wings.py --experiment forgetting
"""

from vlm_prune.benchmarks.cli.app import run_script

if __name__ == "__main__":
    run_script("train-wings")
