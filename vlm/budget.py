"""What a budget means in tokens of an image or a video."""

import math
import re

from vlm_prune.vlm.common.errors import InputError

Budget = int | float | str
EACH_FRAME = re.compile(r"([0-9]{1,12})/frame")


def per_frame(budget: Budget) -> int | None:
    """Returns the tokens of each frame where the budget is a text such as
    `8/frame`; None for other budgets.

    Raises:
        InputError: if it is another text.
    """
    if not isinstance(budget, str):
        return None
    found = EACH_FRAME.fullmatch(budget)
    if found is None:
        raise InputError(
            f"budget {budget!r} is not a number; give tokens per image (64), a fraction (0.11) or "
            "tokens per frame of a video (8/frame)"
        )
    return int(found[1])


def tokens_for(budget: Budget, available: int, frames: int = 0) -> int:
    """Returns how many tokens a budget means for an image or a video, at most all of them.

    A budget is a count, a fraction in (0, 1], or `8/frame` for so many of each frame, which of an
    image means as many in all.

    Args:
        budget: what is given.
        available: tokens of the image or video.
        frames: of a video; 0 for an image.

    Raises:
        InputError: if it is a share below one token of a video.
    """
    each = per_frame(budget)
    if each is not None:
        return min(each * max(1, frames), available)
    if isinstance(budget, int):
        return min(budget, available)
    share = float(budget)
    if frames and share * available < 1:
        # two digits of the least share, rounded up
        scale = 10 ** (len(str(available)) + 1)
        raise InputError(
            f"budget {share:g} is below one of the {available} tokens of a video; give "
            f"{math.ceil(scale / available) / scale:g} or more"
        )
    return max(1, round(share * available))


def widened(budget: Budget, factor: float) -> Budget:
    """Returns a multiple of a budget; shares grow to 1 at most."""
    each = per_frame(budget)
    if each is not None:
        return f"{round(factor * each)}/frame"
    return round(factor * budget) if isinstance(budget, int) else min(1.0, factor * float(budget))


def check_fits(budget: Budget, available: int) -> None:
    """Raises `InputError` when a count is above the tokens that every image has."""
    count = budget if isinstance(budget, int) else per_frame(budget)
    if count is not None and count > available:
        raise InputError(
            f"budget {budget} is above the {available} tokens of an image; "
            f"give 1 to {available}, or a fraction such as 0.11"
        )


def check_budget(budget: Budget) -> None:
    """Raises `InputError` unless `budget` is a positive count, for each image or each frame, or a
    fraction in (0, 1].
    """
    count = per_frame(budget) if isinstance(budget, str) else budget
    known = isinstance(count, int | float) and not isinstance(count, bool)
    if not (known and (count >= 1 if isinstance(count, int) else 0 < count <= 1)):  # type: ignore[operator]
        raise InputError(
            f"budget {budget} is out of range; give tokens per image (64) or a fraction (0.11)"
        )


def parse_budget(text: str) -> Budget:
    """Reads a budget: `64` is a count, `0.11` a fraction, `8/frame` a count for each frame of a video.

    Raises:
        InputError: if it is none of these or out of range.
    """
    budget: Budget = text
    for number in (int, float):
        try:
            budget = number(text)
            break
        except ValueError:
            continue
    check_budget(budget)
    return budget


def even_shares(total: int, parts: int) -> list[int]:
    """Splits a whole number evenly, with larger shares spread over the
    parts: 5 over 3 are 1, 2 and 2.
    """
    return [total * (part + 1) // parts - total * part // parts for part in range(parts)]
