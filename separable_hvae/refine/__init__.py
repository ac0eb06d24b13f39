"""Refinement: schedules, update rules, execution and the loop."""

from separable_hvae.refine.execution.base import Eager, Execution
from separable_hvae.refine.execution.compiled import Compiled
from separable_hvae.refine.execution.cuda_graphs import CudaGraphs
from separable_hvae.refine.history import History, Iterate
from separable_hvae.refine.map_refiner import MAPRefiner
from separable_hvae.refine.objective import FullObjective, Objective, ObjectiveValue, SubsetObjective
from separable_hvae.refine.problem import Problem
from separable_hvae.refine.refiner import Refiner
from separable_hvae.refine.rules import Adam, GaussNewton, GradientDescent, Rule
from separable_hvae.refine.schedules import Chain, Joint, Latent, Parallel, Scale, Schedule, Solve
from separable_hvae.refine.state import InferenceState

__all__ = [
    "Adam",
    "Chain",
    "Compiled",
    "CudaGraphs",
    "Eager",
    "Execution",
    "FullObjective",
    "GaussNewton",
    "GradientDescent",
    "History",
    "InferenceState",
    "Iterate",
    "Joint",
    "Latent",
    "MAPRefiner",
    "Objective",
    "ObjectiveValue",
    "Parallel",
    "Problem",
    "Refiner",
    "Rule",
    "Scale",
    "Schedule",
    "Solve",
    "SubsetObjective",
]
