"""Text that SmolLM2 knows, to keep its skills and to measure whether they were kept.

Plain text is what Python packages ship with: descriptions and licenses. Instructions are templates
with fillers; those of training and those held out share neither a filler nor a package.
"""

from importlib.metadata import PackageNotFoundError, distribution
from itertools import product
from pathlib import Path
from typing import Literal

PACKAGES: dict[str, tuple[str, ...]] = {
    "train": (
        "scikit-learn", "scikit-image", "transformers", "huggingface_hub", "networkx", "tifffile",
        "threadpoolctl", "typer", "rich", "fsspec", "jinja2", "click", "peft", "accelerate",
        "pydantic", "timm", "yarl", "orjson",
    ),
    "held out": (
        "numpy", "scipy", "pillow", "sympy", "regex", "tqdm", "setuptools", "packaging", "pygments",
    ),
}  # fmt: skip
TEMPLATES = {
    "What is the capital of {}?": (
        "Italy", "Japan", "Egypt", "Canada", "Spain", "Kenya", "Norway", "Peru",
        "France", "Germany", "India", "Brazil", "Greece", "Poland", "Turkey", "Chile",
    ),
    "Write one sentence about {}.": (
        "the sea", "a garden", "bread", "winter", "trains", "friendship", "the moon", "a library",
        "rain", "mountains", "music", "horses", "a market", "the night sky", "coffee", "rivers",
    ),
    "Explain in one sentence what {} is.": (
        "gravity", "a verb", "democracy", "a computer", "photosynthesis", "inflation", "a molecule",
        "an atom", "a noun", "a volcano", "electricity", "a metaphor", "evaporation", "a prime number",
    ),
    "Name three kinds of {}.": (
        "fruit", "bird", "tree", "musical instrument", "sport", "fish",
        "vegetable", "flower", "insect", "vehicle", "tool", "cheese",
    ),
    "Give a word that means the opposite of {}.": (
        "hot", "early", "strong", "empty", "happy", "loud",
        "cold", "late", "light", "open", "fast", "rich",
    ),
    "Translate '{}' into French.": (
        "good morning", "thank you", "the house", "I am hungry", "a book",
        "good night", "the cat", "I love you", "water", "see you tomorrow",
    ),
    "Who wrote {}?": (
        "Hamlet", "War and Peace", "Pride and Prejudice", "The Odyssey",
        "Romeo and Juliet", "Moby Dick", "Don Quixote", "Frankenstein",
    ),
    "Give me a short tip about {}.": (
        "sleeping well", "cooking rice", "saving money", "learning a language", "public speaking",
        "studying", "running", "writing letters", "growing tomatoes", "packing a suitcase",
    ),
    "What is {} used for?": (
        "a hammer", "a telescope", "salt", "Python", "a compass", "a bank",
        "a thermometer", "a microscope", "soap", "SQL", "a ladder", "a calculator",
    ),
    "Rewrite this sentence in the past tense: {}": (
        "I walk to school.", "She sings a song.", "They build a house.", "He eats an apple.",
        "We play football.", "The dog runs home.", "I write a letter.", "She opens the door.",
    ),
    "Is {} an animal, a plant or a thing?": (
        "a rose", "a chair", "an eagle", "an oak", "a spoon",
        "a tulip", "a table", "a shark", "a fern", "a bottle",
    ),
    "Why do people {}?": (
        "sleep", "travel", "read books", "keep pets", "laugh",
        "dream", "dance", "vote", "cook food", "build bridges",
    ),
    "Tell me about {}.": (
        "the Sun", "Paris", "dolphins", "the Great Wall of China", "chess",
        "Mars", "London", "elephants", "the Nile", "tennis", "Albert Einstein", "the Internet",
    ),
    "Write a Python function that {}.": (
        "adds two numbers", "reverses a string", "counts vowels", "finds the largest number",
        "checks whether a number is even", "joins a list of words", "sums a list", "squares a number",
    ),
    "How many {}?": (
        "days are in a week", "months are in a year", "legs does a spider have",
        "minutes are in an hour", "continents are there", "sides does a triangle have",
    ),
    "List two advantages of {}.": (
        "riding a bicycle", "remote work", "solar power", "exercise",
        "reading", "public transport", "a balanced diet", "learning music",
    ),
    "What happens when {}?": (
        "ice melts", "you mix red and blue", "a plant gets no water",
        "water boils", "you drop a glass", "metal is heated",
    ),
    "Which is larger, {}?": (
        "the Earth or the Moon", "a mouse or a cow", "a lake or an ocean",
        "a city or a village", "a car or a truck", "an ant or a bee",
    ),
}  # fmt: skip
# Templates that training does not see at all.
UNSEEN_TEMPLATES = {
    "Give an example of {}.": (
        "a mammal", "a chemical element", "a renewable source of energy", "a simile",
    ),
    "Write a two-line poem about {}.": ("autumn", "a bridge", "time", "a small bird"),
}  # fmt: skip
# How an instruction may be asked: as it stands, or with a word about the answer's length.
ENDINGS = ("", " Answer briefly.")


def package_text(part: Literal["train", "held out"]) -> list[str]:
    """Returns descriptions and licenses of packages that are installed, one text per package."""
    texts = []
    for name in PACKAGES[part]:
        try:
            found = distribution(name)
        except PackageNotFoundError:
            continue
        pieces = [(found.read_text("METADATA") or "").partition("\n\n")[2]]
        for file in found.files or ():
            upper = str(file).upper()
            kind = any(word in upper for word in ("LICEN", "COPYING", "NOTICE", "AUTHORS"))
            path = Path(file.locate())
            if ".DIST-INFO" in upper and kind and path.is_file():
                pieces.append(path.read_text(encoding="utf-8", errors="replace"))
        texts.append("\n\n".join(pieces))
    return texts


def instructions(part: Literal["train", "held out"]) -> list[str]:
    """Returns text-only instructions: those of training use the first half of each row of fillers."""
    chosen = []
    for template, fillers in TEMPLATES.items():
        half = len(fillers) // 2
        mine = fillers[:half] if part == "train" else fillers[half:]
        chosen += [template.format(filler) + end for filler, end in product(mine, ENDINGS)]
    if part == "held out":
        for template, fillers in UNSEEN_TEMPLATES.items():
            chosen += [template.format(filler) + end for filler, end in product(fillers, ENDINGS)]
    return chosen
