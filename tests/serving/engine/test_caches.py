"""Two configurations over one store of encoder outputs and of key-value blocks do not mix."""

from itertools import pairwise

import pytest

from vlm_prune.pruning.registry import build

CONFIGURATIONS = [("zoo", 8), ("divprune", 8), ("zoo", 9)]


@pytest.mark.parametrize("family", ["llava", pytest.param("qwen3_vl", marks=pytest.mark.slow)])
def test_configurations_share_a_store(family, folders, pictures, prompts, start, tmp_path):
    encoded, blocks = tmp_path / "encoded", tmp_path / "blocks"
    options = {
        "ec_transfer_config": {
            "ec_connector": "ECExampleConnector", "ec_role": "ec_both",
            "ec_connector_extra_config": {"shared_storage_path": str(encoded)},
        },
        "kv_transfer_config": {
            "kv_connector": "ExampleConnector", "kv_role": "kv_both",
            "kv_connector_extra_config": {"shared_storage_path": str(blocks)},
        },
    }  # fmt: skip
    stored = [set()]
    # the last is the first once more: it finds all that it needs
    for method, budget in [*CONFIGURATIONS, CONFIGURATIONS[0]]:
        engine = start(folders(family), method, budget, **options)
        pruner = build(method, budget=budget)
        expected = [engine.reference(prompt, pictures, pruner)[0] for prompt in prompts]
        assert engine.answers(prompts, pictures) == expected, (method, budget)
        engine.close()
        stored.append({path for path in tmp_path.rglob("*.safetensors")})
    *new, again = [after - before for before, after in pairwise(stored)]
    assert all(new) and not again
    images = {picture for numbers, _ in prompts for picture in numbers}
    for own in new:
        assert sum(encoded in path.parents for path in own) == len(images)
        assert any(blocks in path.parents for path in own)
