"""Training and evaluation."""

from separable_hvae.training.evaluation import evaluate
from separable_hvae.training.loop import FitReport, fit
from separable_hvae.training.options import TrainingOptions

__all__ = ["FitReport", "TrainingOptions", "evaluate", "fit"]
