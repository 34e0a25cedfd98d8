"""Teach a CLIP a stream of tasks: `vlm-prune continual train`.

python scripts/train_continual.py                     # the packaged stream, the tiny CLIP, CoDyRA
python scripts/train_continual.py --stream x-tail --data-root DIR \\
    --model ViT-B-16-quickgelu --pretrained openai    # the paper's run
accelerate launch scripts/train_continual.py ...      # several processes
"""

from vlm_prune.benchmarks.cli.app import run_script

if __name__ == "__main__":
    run_script("continual", "train")
