"""A small share of what ``python -m tests.suites.abuse`` does to ten thousand inputs."""

from itertools import product

import pytest

from separable_hvae.refine.rules import RULES
from separable_hvae.refine.schedules import SCHEDULES
from tests.suites.abuse import abuse


# A seed draws what is known and how; each pair has its own.
@pytest.mark.parametrize(
    ("schedule", "rule", "seed"), [(*pair, seed) for seed, pair in enumerate(product(SCHEDULES, RULES))]
)
def test_refinement_survives(schedule: str, rule: str, seed: int) -> None:
    count = abuse(schedule, rule, 98, seed)
    assert count.inputs == 98
    assert (count.non_finite, count.worse, count.changed) == (0, 0, 0)
