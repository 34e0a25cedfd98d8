"""Conversations of neighboring questions, written to a folder with their images."""

import hashlib
import io
from collections import defaultdict
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.neighbors import NearestNeighbors

from vlm_prune.benchmarks.experiments.iit.files import image_bytes, read_source_rows
from vlm_prune.benchmarks.experiments.iit.sources import LETTERS, SOURCES, Item, read_source
from vlm_prune.benchmarks.tasks.iit import SETTINGS
from vlm_prune.vlm.common.errors import InputError, naming
from vlm_prune.vlm.common.files import write_json, write_text
from vlm_prune.vlm.common.images import open_image
from vlm_prune.vlm.common.records import to_json

LABEL = (
    "a reconstruction of the unpublished IIT benchmark of arXiv 2406.03496; "
    "never compare absolute numbers with the paper's"
)
# The benchmarks name subjects differently; the first group that has a word of the name counts.
SUBJECTS: dict[str, tuple[str, ...]] = {
    "medicine": ("medic", "clinic", "anatom", "nutrition", "pharma", "virol", "aging", "health"),
    "mathematics": ("math", "algebra", "statistic", "logic"),
    "computing": ("comput", "machine_learning", "security", "electronic"),
    "engineering": ("engineer", "energy", "mechanic", "materials", "architecture", "agricult"),
    "business": ("business", "account", "econom", "finance", "market", "manage", "public_rel"),
    "society": ("sociol", "psychol", "politic", "law", "juris", "policy", "sexual", "ethnol"),
    "humanities": ("history", "philos", "religion", "moral", "art", "music", "literat", "design"),
    "science": ("physic", "chemi", "biolog", "astronom", "geograph", "geolog", "genetic", "scien"),
}


class ConversationTurn(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One multiple-choice question of a conversation.

    Args:
        question: its text.
        options: to choose from, of the letters A, B, ...
        answer: the letter of the right one.
        image: file below the conversations' folder; None without an image.
        source: the benchmark that the question is of.
        subject: of the question, as the benchmark names it.
    """

    question: str
    options: Annotated[list[str], msgspec.Meta(min_length=1, max_length=len(LETTERS))]
    answer: str
    image: str | None = None
    source: str = ""
    subject: str = ""

    def __post_init__(self) -> None:
        if self.answer not in LETTERS[: len(self.options)] or len(self.answer) != 1:
            raise ValueError(f"answer {self.answer[:20]!r} is none of its options")


class Conversation(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A line of `iit.jsonl`: a setting, and questions of which the last is to be answered."""

    id: str
    setting: str
    turns: Annotated[list[ConversationTurn], msgspec.Meta(min_length=1)]

    def __post_init__(self) -> None:
        if self.setting not in SETTINGS:
            raise ValueError(f"its setting {self.setting[:60]!r} is none of {'; '.join(SETTINGS)}")
        if len(self.turns) != len(self.setting.split(",")):
            raise ValueError(f"{len(self.turns)} turns for the setting {self.setting}")


def group_of(subject: str) -> str:
    """Returns the broad subject that benchmarks share; everyday scenes are `general`."""
    low = subject.lower().replace(" ", "_")
    return next((g for g, words in SUBJECTS.items() if any(w in low for w in words)), "general")


def conversations(
    items: list[Item], size: int = 500, seed: int = 0
) -> dict[str, list[tuple[Item, ...]]]:
    """Builds for each setting up to `size` conversations whose last turn is to be answered.

    Last turns are drawn evenly over the benchmarks; the turns before them are the text-only
    questions of the same broad subject with the nearest TF-IDF vectors of character n-grams (the
    paper: an embedding store). Nothing is rephrased.

    Args:
        items: questions of all benchmarks.
        size: most conversations of a setting.
        seed: of the last turns.

    Raises:
        InputError: if there are not enough questions.
    """
    by_group: dict[str, list[int]] = defaultdict(list)
    for number, item in enumerate(items):
        if not item.visual:
            by_group[group_of(item.subject)].append(number)
    everything = [n for numbers in by_group.values() for n in numbers]
    if len({items[n].question for n in everything}) < 3:
        raise InputError("three different text-only questions are needed; give more text sources")
    if not any(item.visual for item in items):
        raise InputError("no question has an image; give a visual source, such as mmmu")
    vectorizer = TfidfVectorizer(
        analyzer="char_wb", ngram_range=(2, 4), min_df=1, sublinear_tf=True
    )
    vectors = vectorizer.fit_transform(
        [f"{item.subject} {item.question} {' '.join(item.options)}" for item in items]
    )
    built: dict[str, list[tuple[Item, ...]]] = {}
    for position, setting in enumerate(SETTINGS):
        rng = np.random.default_rng([seed, position])
        targets = _targets(items, setting.endswith("V"), size, rng)
        earlier = setting.count(",")
        chosen: dict[int, list[int]] = {target: [] for target in targets}
        if earlier:
            for group in {group_of(items[t].subject) for t in targets}:
                group_targets = [t for t in targets if group_of(items[t].subject) == group]
                pool = by_group[group]
                if len({items[n].question for n in pool}) <= earlier:
                    pool = everything
                found = NearestNeighbors(n_neighbors=min(len(pool), earlier + 8), metric="cosine")
                near = found.fit(vectors[pool]).kneighbors(
                    vectors[group_targets], return_distance=False
                )
                for target, row in zip(group_targets, near, strict=True):
                    chosen[target] = _distinct(items, target, [pool[k] for k in row], earlier)
        built[setting] = [
            tuple(items[n] for n in (*reversed(chosen[target]), target)) for target in targets
        ]
    return built


def _targets(items: list[Item], visual: bool, size: int, rng: Any) -> list[int]:
    """Draws up to `size` questions, evenly over the benchmarks as far as these last.

    Args:
        items: all questions.
        visual: whether those with an image are drawn, or those without.
        size: how many.
        rng: draws them.
    """
    queues: dict[str, list[int]] = defaultdict(list)
    for number in rng.permutation(len(items)).tolist():
        if items[number].visual == visual:
            queues[items[number].source].append(number)
    drawn: list[int] = []
    while len(drawn) < size and any(queues.values()):
        for source in sorted(queues):
            if queues[source] and len(drawn) < size:
                drawn.append(queues[source].pop())
    return drawn


def _distinct(items: list[Item], target: int, near: list[int], number: int) -> list[int]:
    """Returns the nearest questions, nearest first, none of them asked twice.

    Args:
        items: all questions.
        target: whose neighbors they are.
        near: candidates, nearest first.
        number: how many.

    Raises:
        InputError: if there are fewer.
    """
    questions, kept = {items[target].question}, list[int]()
    for candidate in near:
        if items[candidate].question not in questions and len(kept) < number:
            questions.add(items[candidate].question)
            kept.append(candidate)
    if len(kept) < number:
        raise InputError("too many questions have the same text to find different neighbors")
    return kept


def build_conversations(
    folder: Path,
    sources: dict[str, str | None],
    size: int = 500,
    seed: int = 0,
    allow_outside: bool = False,
) -> dict[str, int]:
    """Writes `iit.jsonl`, `manifest.json` and `images/`; returns conversations per setting.

    Args:
        folder: where to write.
        sources: file, folder or hub name of each source; None for its own hub name.
        size: conversations per setting.
        seed: of the drawing.
        allow_outside: whether files and rows of a source may lead out of its folder.

    Raises:
        InputError: if sources cannot be read or do not suffice.
    """
    for name in sources:
        SOURCES[name]  # an unknown one is refused before another's files are read
    items = [
        item for name, where in sources.items() for item in read_source(name, where, allow_outside)
    ]
    built = conversations(items, size, seed)
    wanted = {
        i
        for several in built.values()
        for conversation in several
        for i in conversation
        if i.visual
    }
    pictures = _images(wanted, folder)
    lines = []
    for setting, several in built.items():
        for number, conversation in enumerate(several):
            turns = [_turn(item, pictures.get(item)) for item in conversation]
            lines.append(Conversation(id=f"{setting}/{number:04d}", setting=setting, turns=turns))
    counts = {setting: len(several) for setting, several in built.items()}
    write_text(folder / "iit.jsonl", "".join(to_json(line, indent=None) for line in lines))
    described = {name: where for name, where in sources.items()}
    write_json(
        folder / "manifest.json",
        {"label": LABEL, "seed": seed, "size": size, "counts": counts, "sources": described},
    )
    return counts


def _turn(item: Item, image: str | None) -> ConversationTurn:
    with naming(f"the question {item.question[:60]!r} of {item.source} cannot be used"):
        turn = ConversationTurn(
            question=item.question, options=list(item.options), answer=item.answer, image=image,
            source=item.source, subject=item.subject,
        )  # fmt: skip
        to_json(turn)
        return turn


def _images(items: set[Item], folder: Path) -> dict[Item, str]:
    """Copies the images of questions into the folder, each once; returns their names."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    by_file: dict[Path, dict[int, Item]] = defaultdict(dict)
    for item in items:
        by_file[item.place[0]][item.place[1]] = item
    names: dict[Item, str] = {}
    for path, cells in by_file.items():
        for number, row in enumerate(read_source_rows(path, images=True)):
            if number not in cells:
                continue
            cell = row["image"] if row.get("image") is not None else row.get("image_1")
            content = image_bytes(cell, cells[number].root)
            picture = open_image(io.BytesIO(content))
            name = f"images/{hashlib.sha256(content).hexdigest()[:16]}.png"
            picture.save(folder / name)
            names[cells[number]] = name
    return names
