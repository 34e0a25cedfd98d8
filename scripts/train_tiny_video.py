"""Train the embedded LLaVA-OneVision for videos: `vlm-prune train-tiny video`.

python scripts/train_tiny_video.py FOLDER --install
"""

from vlm_prune.benchmarks.cli.app import run_script

if __name__ == "__main__":
    run_script("train-tiny", "video")
