"""What a budget means in tokens of an image or a video."""

from vlm_prune.vlm.common.errors import InputError


def tokens_for(budget: float, available: int) -> int:
    """Tokens that a budget means for an image: a count, at most all, or a fraction in (0, 1]."""
    if isinstance(budget, int):
        return min(budget, available)
    return max(1, round(budget * available))


def check_fits(budget: float, available: int) -> None:
    """Raises `InputError` when a count is above the tokens that every image has."""
    if isinstance(budget, int) and budget > available:
        raise InputError(
            f"budget {budget} is above the {available} tokens of an image; "
            f"give 1 to {available}, or a fraction such as 0.11"
        )


def check_budget(budget: float) -> None:
    """Raises `InputError` unless `budget` is a positive count or a fraction in (0, 1]."""
    known = isinstance(budget, int | float) and not isinstance(budget, bool)
    if not (known and (budget >= 1 if isinstance(budget, int) else 0 < budget <= 1)):
        raise InputError(
            f"budget {budget} is out of range; give tokens per image (64) or a fraction (0.11)"
        )


def even_shares(total: int, parts: int) -> list[int]:
    """A whole number split evenly, larger shares spread over the parts: 5 over 3 are 1, 2 and 2."""
    return [total * (part + 1) // parts - total * part // parts for part in range(parts)]
