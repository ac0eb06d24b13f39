"""Refinement: schedules, update rules and the loop."""

from separable_hvae.refine.problem import Problem
from separable_hvae.refine.refiner import History, Iterate, MAPRefiner, Refiner
from separable_hvae.refine.rules import Adam, GradientDescent, Rule
from separable_hvae.refine.schedules import Joint, Latent, Parallel, Scale, Schedule

__all__ = [
    "Adam",
    "GradientDescent",
    "History",
    "Iterate",
    "Joint",
    "Latent",
    "MAPRefiner",
    "Parallel",
    "Problem",
    "Refiner",
    "Rule",
    "Scale",
    "Schedule",
]
