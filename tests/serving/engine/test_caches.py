"""Two configurations over one store of encoder outputs and of key-value blocks do not mix."""

from itertools import pairwise

import pytest
from safetensors.torch import load_file

from vlm_prune.pruning.registry import build

BLOCK = 32  # tokens whose keys and values are stored together: fewer than a prompt has

CONFIGURATIONS = [("random", 8, 0), ("divprune", 8, 0), ("random", 9, 0), ("random", 8, 1)]


@pytest.mark.parametrize("family", ["llava", pytest.param("qwen3_vl", marks=pytest.mark.slow)])
def test_configurations_share_a_store(family, folders, pictures, prompts, start, tmp_path):
    encoded, blocks = tmp_path / "encoded", tmp_path / "blocks"
    options = {
        "block_size": BLOCK,
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
    for method, budget, seed in [*CONFIGURATIONS, CONFIGURATIONS[0]]:
        engine = start(folders(family), method, budget, seed, **options)
        pruner = build(method, budget=budget, seed=seed)
        expected = [engine.reference(prompt, pictures, pruner)[0] for prompt in prompts]
        assert engine.answers(prompts, pictures) == expected, (method, budget, seed)
        engine.close()
        stored.append({path for path in tmp_path.rglob("*.safetensors")})
    *new, again = [after - before for before, after in pairwise(stored)]
    assert all(new) and not again
    images = {picture for numbers, _ in prompts for picture in numbers}
    for own in new:
        assert sum(encoded in path.parents for path in own) == len(images)
        held = [load_file(path) for path in own if blocks in path.parents]
        assert any(tensor.numel() for tensors in held for tensor in tensors.values())
