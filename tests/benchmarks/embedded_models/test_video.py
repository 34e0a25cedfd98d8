"""The training of the embedded video model: its rows are the model's prompts, and it resumes."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from vlm_prune.benchmarks.embedded_models.language import pack
from vlm_prune.benchmarks.embedded_models.movies import (
    Sampling,
    drawn_tokens,
    make_set,
    play,
    questions_about,
)
from vlm_prune.benchmarks.embedded_models.video import VideoRecipe, VideoTrainer
from vlm_prune.benchmarks.tasks import (
    TASKS,
    appears,
    direction,
    event,
    middle,
    order,
    passes,
)
from vlm_prune.benchmarks.tasks.scenes import SHAPES
from vlm_prune.vlm.common.state import load_tensors
from vlm_prune.vlm.tiny.video import WEIGHTS

SHORT = VideoRecipe(minutes=60.0, sets=2)


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    return VideoTrainer(tmp_path_factory.mktemp("video"), SHORT)


def test_a_row_of_a_whole_video_is_the_prompt_of_the_processor(trainer):
    """The decoder's states behind the question are those of the model itself."""
    sample = TASKS["order"].sample(0, split="val")
    row = trainer.row_of("order", 0)
    batch = pack([row], trainer.processor.tokenizer, trainer.model.config.image_token_id)
    text = trainer.processor.apply_chat_template(sample.messages(), add_generation_prompt=True)
    inputs = trainer.processor(
        text=text, videos=[sample.videos[0].frames], do_sample_frames=False, return_tensors="pt"
    )
    ids, length = inputs.input_ids[0], inputs.input_ids.shape[1]
    seen = ids != trainer.model.config.video_token_id
    assert batch.ids[0, :length][seen].tolist() == ids[seen].tolist()
    with torch.no_grad():
        states = trainer.hidden_states([row], batch)[0, length - 1]
        trainer.decoder.set_attn_implementation("sdpa")
        wanted = trainer.model.model(**inputs).last_hidden_state[0, -1]
        trainer.decoder.set_attn_implementation("packed")
    # features are kept in fp16
    torch.testing.assert_close(states, wanted, atol=0.03, rtol=0.03)


def test_movies_of_a_set_are_those_of_the_task():
    """Same questions, same times; answers are what happens."""
    for module in (appears, order, event, middle, passes, direction):
        plot, rng = module.TASK.name, np.random.default_rng(0)
        found = make_set(rng, plot)
        names = {name for _, name, _ in found.things}
        texts = {form(module.ask(rng).question.text) for _ in range(20)}
        for _ in range(10):
            actors = play(rng, plot, found)
            mine = [
                question for kind, question in questions_about(rng, plot, actors) if kind == plot
            ]
            assert mine and {form(question.text) for question in mine} <= texts
            assert {actor.name for actor in actors} <= names
            assert len({question.answer for question in mine} & names) == len(mine) or plot in (
                "order", "passes", "direction"
            )  # fmt: skip


def form(text):
    """A question without the names of shapes."""
    return " ".join(word for word in text.split() if word.strip("?") not in SHAPES)


def test_a_row_keeps_a_token_of_each_sighting_and_all_of_them_if_whole():
    rng = np.random.default_rng(0)
    shown = torch.zeros(16, 2, 36, dtype=torch.bool)
    shown[2:4, 0, 3:5] = True
    shown[9, 0, 7] = True
    shown[5, 1, :4] = True
    keep = drawn_tokens(rng, shown, Sampling(10, 0.0))
    things = shown.any(1).flatten().nonzero()[:, 0]
    assert set(things.tolist()) <= set(keep.tolist()) and len(keep) <= len(things) + 10
    for _ in range(20):
        frames = set((drawn_tokens(rng, shown, Sampling(0, 1.0)) // 36).tolist())
        assert {5, 9} <= frames and frames & {2, 3}
    assert len(drawn_tokens(rng, shown, Sampling(10, 1.0, whole=1.0))) == 16 * 36


@pytest.mark.slow
def test_a_stopped_training_goes_on_as_if_it_had_not_been(trainer, tmp_path):
    VideoTrainer(tmp_path, SHORT).run(until=1)
    resumed = VideoTrainer(tmp_path, SHORT)
    assert resumed.progress.step == 1
    # the rate follows the time that was spent
    resumed.progress.spent = trainer.progress.spent = 0.0
    trainer.run(until=1)
    trainer.progress.spent = 0.0
    trainer.run(until=2)
    resumed.run(until=2)
    for name, tensor in trainer.weights.items():
        torch.testing.assert_close(resumed.weights[name], tensor, atol=1e-4, rtol=1e-3, msg=name)
    resumed.write_weights(tmp_path)
    assert load_tensors(tmp_path / WEIGHTS).keys() == trainer.weights.keys()
    with pytest.raises(Exception, match="recipe"):
        VideoTrainer(tmp_path, replace(SHORT, sets=3))
