"""What holds for every test."""

import os

from hypothesis import settings

# A busy machine is no defect, and a suite that decides what may be merged gives the same answer twice; `make search`
# looks for new counterexamples.
settings.register_profile("suite", deadline=None, derandomize=True)
settings.register_profile("search", deadline=None, max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "suite"))
