"""The published streams: MTIL in both orders and with five shots, and X-TAIL.

MTIL: https://arxiv.org/abs/2303.06628 (ZSCL); X-TAIL: https://arxiv.org/abs/2406.18868 (RAIL).
"""

from pathlib import Path

from vlm_prune.continual.streams.coop import coop_task
from vlm_prune.continual.streams.stream import Stream, few_shot
from vlm_prune.continual.streams.torchvision_sets import torchvision_task
from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.common.paths import DataRoot

ORDER_1 = (
    "aircraft", "caltech101", "cifar100", "dtd", "eurosat", "flowers",
    "food101", "mnist", "pets", "cars", "sun397",
)  # fmt: skip
ORDER_2 = (
    "cars", "food101", "mnist", "pets", "flowers", "sun397",
    "aircraft", "caltech101", "dtd", "eurosat", "cifar100",
)  # fmt: skip
X_TAIL = tuple(key for key in ORDER_1 if key != "cifar100")


def mtil(
    root: Path | DataRoot,
    order: int = 1,
    shots: int | None = None,
    seed: int = 0,
    skip_bad: bool = False,
) -> Stream:
    """Opens MTIL: eleven data sets, 1,201 classes; an image is scored
    against its own set's classes.

    Args:
        root: folder with the data sets in torchvision's layout.
        order: 1 (alphabetical) or 2.
        shots: training images per class; all of them by default. Where the published 5-shot runs
            store five augmented crops per class, this draws five images and leaves augmentation
            to training.
        seed: of the shots.
        skip_bad: leave out images that cannot be read.
    """
    if order not in (1, 2):
        raise InputError(f"MTIL has the orders 1 and 2, not {order}")
    tasks = tuple(torchvision_task(key, root, skip_bad) for key in (ORDER_1, ORDER_2)[order - 1])
    if shots is not None:
        tasks = tuple(few_shot(task, shots, seed) for task in tasks)
    name = f"mtil-{order}" if shots is None else f"mtil-{shots}shot"
    return Stream(name, tasks, joint=False, ensemble=True)


def x_tail(
    root: Path | DataRoot,
    shots: int = 16,
    seed: int = 0,
    repeat: bool = False,
    skip_bad: bool = False,
) -> Stream:
    """Opens X-TAIL: ten data sets, 1,100 classes; an image is scored
    against all of them, seen or not.

    Each data set keeps its own template, as in the published code; some prompts of different data
    sets are then the same text, which `Stream.ambiguous` lists.

    Args:
        root: folder with the data sets in CoOp's layout, and MNIST in torchvision's.
        shots: training images per class.
        seed: of the shots, drawn per data set.
        repeat: draw images again where a class has too few, as the published code does.
        skip_bad: leave out images that cannot be read.
    """
    tasks = (coop_task(key, root, skip_bad) for key in X_TAIL)
    drawn = tuple(few_shot(task, shots, seed, repeat) for task in tasks)
    return Stream("x-tail", drawn, joint=True, ensemble=False)
