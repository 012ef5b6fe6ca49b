"""The paper's claims, what decides each of them, and the rule: fixed before the runs.

A claim is measured by one number, put together from `terms`: so many times this metric of that row of runs. It is so
oriented that above 0 speaks for the claim.
"""

from __future__ import annotations

from dataclasses import dataclass

Term = tuple[float, str, str]  # weight, row of runs, metric


@dataclass(frozen=True)
class Claim:
    letter: str
    says: str  # what the paper says, with its number
    test: str  # what is measured here
    task: str  # whose runs decide it
    terms: tuple[Term, ...]
    gain: float | None = None  # the paper's number, in the unit of ours
    unit: str = ""
    digits: int = 4


CLAIMS = [
    Claim(
        "A",
        "Better in domain: +0.5 points on GLUE, +0.6 with CLIP",
        "movies: accuracy at sigma 0.1 against LoRA",
        "movies",
        ((1, "sigma 0.1", "test_right"), (-1, "sigma 0", "test_right")),
        gain=0.5,
        unit="points of accuracy",
        digits=2,
    ),
    Claim(
        "B",
        "Better out of domain, the more the stronger the shift (CIFAR-100-C: 2.2 points more at severity 5 than at 1)",
        "movies: gain of accuracy under typos of severity 5 less that under severity 1, sigma 0.1",
        "movies",
        (
            (1, "sigma 0.1", "typos_5_right"),
            (-1, "sigma 0", "typos_5_right"),
            (-1, "sigma 0.1", "typos_1_right"),
            (1, "sigma 0", "typos_1_right"),
        ),
        gain=2.2,
        unit="points of accuracy",
        digits=2,
    ),
    Claim(
        "C",
        "Flatter around W'",
        "movies: how much less noise of sigma 0.1 raises the training loss, trained at sigma 0.1 against LoRA",
        "movies",
        ((1, "sigma 0", "rise_0.1"), (-1, "sigma 0.1", "rise_0.1")),
        unit="nats of loss",
    ),
    Claim(
        "D",
        "Training loss slightly higher, gap to the test smaller",
        "movies: how much smaller test loss less training loss is, sigma 0.1 against LoRA",
        "movies",
        (
            (1, "sigma 0", "test_loss"),
            (-1, "sigma 0", "train_loss"),
            (-1, "sigma 0.1", "test_loss"),
            (1, "sigma 0.1", "train_loss"),
        ),
        unit="nats of loss",
    ),
    Claim(
        "E1",
        "SAM on (A, B) moves W' in the rows of A only and is worse than SAM on W'",
        "packages: test loss of SAM on (A, B) less that of SAM on W', each at its best rho",
        "packages",
        ((1, "best SAM on (A, B)", "test_loss"), (-1, "best SAM on W'", "test_loss")),
        unit="nats of loss",
    ),
    Claim(
        "E2",
        "As good as SAM on W' or better, in half the time",
        "packages: test loss of SAM on W' less that of Flat-LoRA, each at its best strength",
        "packages",
        ((1, "best SAM on W'", "test_loss"), (-1, "best Flat-LoRA", "test_loss")),
        unit="nats of loss",
    ),
    Claim(
        "F",
        "Of sigma 0 to 0.2, 0.05 and 0.1 are best",
        "movies: mean accuracy at sigma 0.05 and 0.1 less that at 0 and 0.3",
        "movies",
        (
            (0.5, "sigma 0.05", "test_right"),
            (0.5, "sigma 0.1", "test_right"),
            (-0.5, "sigma 0", "test_right"),
            (-0.5, "sigma 0.3", "test_right"),
        ),
        unit="points of accuracy",
        digits=2,
    ),
    Claim(
        "G",
        "Gains at rank 8 and at 16, larger at 16",
        "packages: gain of test loss at rank 16 less that at rank 8, sigma 0.1",
        "packages",
        (
            (1, "sigma 0", "test_loss"),
            (-1, "sigma 0.1", "test_loss"),
            (-1, "rank 8, sigma 0", "test_loss"),
            (1, "rank 8, sigma 0.1", "test_loss"),
        ),
        unit="nats of loss",
    ),
    Claim(
        "H1",
        "Noise that grows along a cosine (a choice of the paper's, without an ablation)",
        "packages: test loss at constant sigma 0.3 less that at sigma growing to 0.3",
        "packages",
        ((1, "constant, sigma 0.3", "test_loss"), (-1, "sigma 0.3", "test_loss")),
        unit="nats of loss",
    ),
    Claim(
        "H2",
        "Noise scaled to each row (a choice of the paper's, without an ablation)",
        "packages: test loss with one standard deviation per matrix less that with one per row, sigma 0.3",
        "packages",
        ((1, "one std per matrix, sigma 0.3", "test_loss"), (-1, "sigma 0.3", "test_loss")),
        unit="nats of loss",
    ),
    Claim(
        "I",
        "The outputs' variance grows by 1 + sigma^2 whatever n, for inputs of mean zero (proposition 3.2)",
        "variance: growth at n = 4,096 less that at n = 64, as a share of sigma^2 = 0.25; reproduced if the interval "
        "lies within -0.05 and 0.05, contradicted if it lies outside",
        "variance",
        ((1, "mean 0, n 4096", "growth"), (-1, "mean 0, n 64", "growth")),
        digits=3,
    ),
    Claim(
        "J",
        "+2.5 % time, +0.1 GB (Llama-2-7B on an RTX 4090)",
        "cost: 2.5 less the extra time of a step of 4 x 1,024 tokens, in 32 blocks of that model's shape on an NVIDIA "
        "H200; for memory see Cost (added after the other runs, when a card was at hand)",
        "cost",
        ((1, "all 32, 4 x 1,024", "of_paper"), (-1, "all 32, 4 x 1,024", "extra")),
        unit="% of LoRA's time",
        digits=1,
    ),
    Claim(
        "K",
        "(ours) After strong noise, rounding to 3 bits costs less",
        "packages: how much less rounding raises the test loss, sigma 0.3 against LoRA",
        "packages",
        ((1, "sigma 0", "rise_3_bits"), (-1, "sigma 0.3", "rise_3_bits")),
        unit="nats of loss",
    ),
]


def word(low: float, high: float, gain: float | None) -> str:
    """What an interval says of a claim: above 0 speaks for it, below half of the paper's gain against it."""
    reproduced = low > 0
    contradicted = high < (gain / 2 if gain else 0)
    if reproduced and contradicted:
        return "reproduced, smaller"
    if reproduced:
        return "reproduced"
    if contradicted:
        return "contradicted"
    return "undecided"


def word_of_equality(low: float, high: float, margin: float = 0.05) -> str:
    """For claim I, by which a number is 0."""
    if -margin < low and high < margin:
        return "reproduced"
    if low > margin or high < -margin:
        return "contradicted"
    return "undecided"
