"""`map --engine vllm` writes the table that the Hugging Face engine writes."""

import pytest
from pyarrow import parquet

from vlm_prune.benchmarks.batch.config import MapConfig
from vlm_prune.benchmarks.batch.pipeline import map_images
from vlm_prune.benchmarks.evaluation.records import Variant
from vlm_prune.benchmarks.tasks import TASKS
from vlm_prune.vlm.common.errors import InputError


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(4):
        TASKS["attribute"].sample(number).images[0].save(folder / f"{number}.png")
    (folder / "broken.png").write_bytes(b"no picture")
    return folder


def table(photos, output, engine, method="zoo"):
    config = MapConfig(
        str(photos), "What color is the circle?", "tiny", Variant(method, 64), "cpu", engine=engine
    )
    assert map_images(config, output, batch_size=2) == (5, 1)
    return parquet.read_table(output).to_pylist()


def test_both_engines_write_the_same_rows(photos, tmp_path):
    rows = {e: table(photos, tmp_path / f"{e}.parquet", e) for e in ("hf", "vllm")}
    for one, other in zip(rows["hf"], rows["vllm"], strict=True):
        assert one.keys() == other.keys()
        for name in ("path", "answer", "kept_tokens", "error"):
            assert one[name] == other[name]
    with pytest.raises(InputError):  # an output holds the answers of one engine
        table(photos, tmp_path / "hf.parquet", "vllm")


def test_a_method_that_vllm_cannot_run_is_refused_before_ray_starts(photos, tmp_path):
    with pytest.raises(InputError, match="inside the language model"):
        table(photos, tmp_path / "out.parquet", "vllm", "fastv")
