"""How long a test waits for something that must happen.

The deadline only ends a test that fails: a loaded machine makes tests slower, never red. So nothing is asserted about
seconds that have passed, but for the fewest that a process had to wait by itself.
"""

from __future__ import annotations

from typing import Final

__all__ = ["DEADLINE"]

DEADLINE: Final = 300.0  # seconds; half of pytest's own, so that the test can say what it waited for
