"""Pre-train the embedded CLIP: `vlm-prune train-tiny clip`.

python scripts/train_tiny_clip.py FOLDER --install
"""

from vlm_prune.benchmarks.cli.app import run_script

if __name__ == "__main__":
    run_script("train-tiny", "clip")
