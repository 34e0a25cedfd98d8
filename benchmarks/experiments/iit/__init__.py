"""Interleaved image-text conversations from public benchmarks: a reconstruction.

The IIT benchmark of Wings (https://arxiv.org/abs/2406.03496, section 4.2) was never published. This
builds one of the same design from MMLU, CMMLU, OpenbookQA, HellaSwag, MMMU, MMBench, SEED-Bench and
AI2D: six settings, the last turn is scored. Numbers on it must not be compared with the paper's.
"""
