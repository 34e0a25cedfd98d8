"""Several images in one prompt, for long prompts; made from a seed."""

from collections.abc import Callable

import numpy as np

from vlm_prune.benchmarks.tasks.base import Question, Sample, Split, Turn
from vlm_prune.benchmarks.tasks.scenes import Scene, make_scene

IMAGES = 6
THINGS = 2


def about_album(
    ask: Callable[[np.random.Generator, list[Scene]], Question | None],
) -> Callable[[np.random.Generator, Split], Sample]:
    """Returns a sample maker that shows six new scenes of two things each and asks one question about them."""

    def make(rng: np.random.Generator, split: Split) -> Sample:
        while True:
            scenes = [make_scene(rng, split, THINGS) for _ in range(IMAGES)]
            if (question := ask(rng, scenes)) is not None:
                turn = Turn(question.text, tuple(scene.image for scene in scenes))
                return Sample((turn,), question.answer, question.subset)

    return make
