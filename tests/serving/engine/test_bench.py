"""`bench --engine vllm` answers the same list with both engines."""

import pytest

from vlm_prune.benchmarks.speed.serving import ARMS, ServingConfig, bench_serving, serving_rows


@pytest.mark.slow
def test_both_engines_answer_the_list_at_each_concurrency():
    config = ServingConfig(
        "llava-0.5b", "zoo", 64, requests=3, concurrency=(1, 2), new_tokens=2, repeats=1, layers=1
    )
    results = bench_serving(config)
    for arm in ARMS:
        assert [each["concurrency"] for each in results[arm]] == [1, 2]
        for each in results[arm]:
            (load,) = each["runs"]
            assert load["requests"] == len(load["first_token_s"]) == 3
            assert all(0 < seconds <= load["seconds"] for seconds in load["first_token_s"])
    before, after = (results[arm][0]["prompt_tokens"] for arm in ARMS)
    assert before - after == 576 - 64
    assert len(serving_rows(results)) == 1 + len(results["speedup"])
