"""Build the IIT reconstruction, or evaluate a model on it: `vlm-prune iit`.

python scripts/iit.py build IIT --source mmlu=copies/mmlu --source mmmu=lmms-lab/MMMU
python scripts/iit.py evaluate IIT --model llava-hf/llava-1.5-7b-hf --context own
"""

from vlm_prune.benchmarks.cli.app import run_script

if __name__ == "__main__":
    run_script("iit")
