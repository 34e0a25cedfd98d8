"""What `forgetting.json` holds."""

import msgspec

from vlm_prune.benchmarks.evaluation.records import SCHEMA_VERSION, Amount, Interval, Record
from vlm_prune.benchmarks.experiments.forgetting.arms import Plan
from vlm_prune.benchmarks.experiments.forgetting.measure import ArmRecord

Estimate = tuple[float, Interval]


class SeedAccuracies(Record, frozen=True):
    """Accuracies of each seed."""

    text: list[float]
    visual: list[float]


class SkillDifferences(Record, frozen=True):
    """Differences of accuracies, each with its paired interval."""

    text: Estimate
    visual: Estimate


class LanguageSkills(Record, frozen=True):
    """What an arm left of the language model's own skills; means with 95 % intervals.

    Args:
        loss: on held-out texts, in nats a token.
        loss_above_base: the same less the base's, paired by text.
        same_meaning: share of answers to held-out instructions that mean what the base's do.
        identical: share that are the base's.
        wings_loss_minus_it: the loss that Wings has more.
        wings_same_meaning_minus_it: the share of answers that Wings has more.
    """

    loss: Estimate
    loss_above_base: Estimate
    same_meaning: Estimate
    identical: float
    wings_loss_minus_it: Estimate
    wings_same_meaning_minus_it: Estimate


class ArmSummary(Record, frozen=True):
    """Means with 95 % intervals over seeds and scenes, of one arm.

    Args:
        text: accuracy on questions without an image.
        visual: accuracy on questions about images.
        by_seed: the same of each seed.
        wings_minus_it: what Wings has more.
        t: accuracy on interleaved conversations of this setting of `SETTINGS`, as its five siblings.
        with_first_token: attention shift; None where it is undefined for each prompt.
        without_first_token: the same without attention to the first token.
        trainable: parameters.
        step_s: median seconds of a step.
        memory_bytes: that training holds at once.
        alpha: how far merging went with each seed.
        language: what is left of the language model's own skills, where the plan measures them.
    """

    text: Estimate
    visual: Estimate
    by_seed: SeedAccuracies = msgspec.field(name="by seed")
    wings_minus_it: SkillDifferences = msgspec.field(name="wings minus it")
    t: Estimate = msgspec.field(name="T")
    t_t: Estimate = msgspec.field(name="T,T")
    t_t_t: Estimate = msgspec.field(name="T,T,T")
    t_t_v: Estimate = msgspec.field(name="T,T,V")
    t_v: Estimate = msgspec.field(name="T,V")
    v: Estimate = msgspec.field(name="V")
    with_first_token: Estimate | None = msgspec.field(name="with first token")
    without_first_token: Estimate | None = msgspec.field(name="without first token")
    trainable: Amount
    step_s: Amount
    memory_bytes: Amount
    alpha: list[float]
    language: LanguageSkills | None = None

    @property
    def settings(self) -> list[Estimate]:
        """Returns accuracies on interleaved conversations, in the order of `SETTINGS`."""
        return [self.t, self.t_t, self.t_t_t, self.t_t_v, self.t_v, self.v]


class ForgettingResults(Record, tag_field="schema_version", tag=SCHEMA_VERSION, frozen=True):
    """`forgetting.json`.

    Args:
        plan: sizes and rates.
        base: the language model before it learned to see.
        device: its name.
        versions: of the packages that decide results.
        command: as a shell reads it.
        arms: what was measured of each arm, by seed.
        summary: of each arm.
    """

    plan: Plan
    base: str
    device: str
    versions: dict[str, str]
    command: str
    arms: dict[str, list[ArmRecord]]
    summary: dict[str, ArmSummary]
