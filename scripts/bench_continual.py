"""Time a training step of CoDyRA against plain LoRA: `vlm-prune continual bench`.

python scripts/bench_continual.py --model ViT-B-16-quickgelu --batch 64 --classes 100
"""

from vlm_prune.benchmarks.cli.app import run_script

if __name__ == "__main__":
    run_script("continual", "bench")
