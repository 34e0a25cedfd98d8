"""Measure the text skills of the embedded LLaVA over SmolLM2: `vlm-prune train-tiny measure-smol`.

python scripts/measure_smol_llava.py docs/results/smol/text_skills.json
"""

from vlm_prune.benchmarks.cli.app import run_script

if __name__ == "__main__":
    run_script("train-tiny", "measure-smol")
