"""VQA-style answer normalization, https://visualqa.org/evaluation.html."""

import re

_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_WORDS = {word: str(value) for value, word in enumerate(_NUMBERS)} | {"none": "0"}
_ARTICLES = {"a", "an", "the"}


def normalize(answer: str) -> str:
    """Returns an answer in lower case, without articles and punctuation, number
    words as digits, single spaces.
    """
    text = re.sub(r"(?<!\d)[^\w\s]|[^\w\s](?!\d)", " ", answer.lower())
    words = (_WORDS.get(word, word) for word in text.split())
    return " ".join(word for word in words if word not in _ARTICLES)


def exact_match(prediction: str, answer: str) -> float:
    """Returns 1.0 when both normalize to the same words, else 0.0."""
    return float(normalize(prediction) == normalize(answer))
