"""`bench --engine vllm` answers the same list with both engines."""

import multiprocessing
import os
from dataclasses import replace

import pytest

from vlm_prune.benchmarks.speed import serving
from vlm_prune.benchmarks.speed.serving import ARMS, ServingConfig, bench_serving, serving_rows
from vlm_prune.vlm.common.errors import InputError

CONFIG = ServingConfig(
    "llava-0.5b", "zoo", 64, requests=3, concurrency=(1, 2), new_tokens=2, repeats=1, layers=1
)


def test_what_keeps_an_engine_from_starting_is_one_line():
    with pytest.raises(InputError, match="^vLLM does not serve the unpruned llava-0.5b: .*dtype"):
        bench_serving(replace(CONFIG, dtype="float12"))


def test_a_process_that_ends_is_named():
    process = multiprocessing.get_context("spawn").Process(target=os._exit, args=(7,))
    process.start()
    with (
        pytest.raises(InputError, match="ended with code 7 while it served the pruned"),
        serving._alive(CONFIG, "pruned", process),
    ):
        process.join()
        raise EOFError


@pytest.mark.slow
def test_both_engines_answer_the_list_at_each_concurrency():
    results = bench_serving(CONFIG)
    for arm in ARMS:
        served = getattr(results, arm)
        assert [each.concurrency for each in served] == [1, 2]
        for each in served:
            (load,) = each.runs
            assert load.requests == len(load.first_token_s) == 3
            assert all(0 < seconds <= load.seconds for seconds in load.first_token_s)
    before, after = (getattr(results, arm)[0].prompt_tokens for arm in ARMS)
    assert before - after == 576 - 64
    assert len(serving_rows(results)) == 1 + len(results.speedup)
