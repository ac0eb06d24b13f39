"""Hypothesis profiles: a few fixed examples in every run, five hundred random ones on demand.

pytest tests/decompositions/test_laws.py --hypothesis-profile=full
"""

from hypothesis import settings

settings.register_profile("few", max_examples=12, deadline=None, derandomize=True)
settings.register_profile("full", max_examples=500, deadline=None, print_blob=True)
settings.load_profile("few")
