"""Training and evaluation."""

from separable_hvae.training.evaluation import evaluate
from separable_hvae.training.loop import FitReport, fit

__all__ = ["FitReport", "evaluate", "fit"]
