"""How much text skill a language model loses by learning to see, and what keeps it.

Wings (https://arxiv.org/abs/2406.03496) is compared with full tuning at two rates, LoRA, replay, a
frozen language model and merging, on one base model, data set and vision tower, over several seeds.
"""
