"""Equal change: the dose at which a push moves the residual stream as far as another one did.

Two pushes of one strength move a text by different amounts, because the texts that come out differ and short residual vectors are moved further.
Effects can be compared where both moved the stream as far, so each control's dose is searched for, with new texts at every dose that is tried.
"""

import math
from dataclasses import dataclass

PRECISION = 0.05
"""Allowed deviation of a control's achieved change from the one it should have, as a share."""
ROUNDS = 6
"""How often a cell is written anew at most: texts are sampled, so the change does not depend on the dose smoothly."""


@dataclass
class ChangeSearch:
    """Search for the factor on one cell's dose: proportional steps, and halving of the bracket where these leave it."""

    target: float
    """Achieved change that is wanted; NaN or 0 where there is nothing to compare with."""
    largest: float = math.inf
    """Factor that is never exceeded."""
    precision: float = PRECISION
    """Allowed relative deviation."""
    factor: float = math.nan
    """Best factor so far; NaN before the first text."""
    change: float = math.nan
    """Achieved change there."""
    low: float = 0.0
    """Largest factor that moved too little."""
    high: float = math.inf
    """Smallest factor that moved too far."""
    _last: tuple[float, float] = (math.nan, math.nan)

    def saw(self, factor: float, change: float) -> bool:
        """Note what a factor achieved; whether it is the best so far."""
        self._last = factor, change
        if change < self.target:
            self.low = max(self.low, factor)
        elif change > self.target:
            self.high = min(self.high, factor)
        if math.isnan(self.factor) or self._off(change) < self._off(self.change):
            self.factor, self.change = factor, change
            return True
        return False

    def next(self) -> float | None:
        """Factor to try next; None where the change is as wanted, cannot be known, or cannot come closer."""
        factor, change = self._last
        known = math.isfinite(change) and change > 0 and math.isfinite(self.target) and self.target > 0
        if not known or self._off(self.change) <= self.precision:
            return None
        found = factor * self.target / change
        if self.low >= self.high:  # sampled texts need not follow the dose: begin again from the middle
            found, self.low, self.high = (self.low + self.high) / 2, 0.0, math.inf
        if not self.low < found < self.high:
            found = (self.low + self.high) / 2 if math.isfinite(self.high) else 2 * self.low
        found = min(found, self.largest)
        return None if math.isclose(found, factor, rel_tol=1e-3) else found

    @property
    def missed(self) -> bool:
        """Whether there is a target and a change, and they differ by more than the precision."""
        return self.target > 0 and math.isfinite(self.change) and self._off(self.change) > self.precision

    def _off(self, change: float) -> float:
        off = abs(change / self.target - 1) if self.target > 0 else math.nan
        return math.inf if math.isnan(off) else off
