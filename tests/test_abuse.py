"""A small share of what ``python -m tests.abuse`` does to ten thousand inputs."""

import pytest

from separable_hvae.refine.rules import RULES
from separable_hvae.refine.schedules import SCHEDULES
from tests.abuse import abuse


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_refinement_survives(schedule: str, rule: str) -> None:
    count = abuse(schedule, rule, 98, seed=1)
    assert count.inputs == 98
    assert (count.non_finite, count.worse, count.changed) == (0, 0, 0)
