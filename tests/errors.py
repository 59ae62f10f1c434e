"""What `pytest --errors` prints: how many numbers each test compared, and how far apart they were."""

import os

import numpy as np


class Errors:
    """Watches NumPy's assertions, which still assert as before. In one process only, without `-n`."""

    def __init__(self):
        self._rows = {}
        for name in ("assert_array_equal", "assert_allclose", "assert_array_max_ulp"):
            setattr(np.testing, name, self._watched(getattr(np.testing, name)))

    def _watched(self, check):
        def watched(actual, expected, *rest, **options):
            self._note(actual, expected)
            return check(actual, expected, *rest, **options)

        return watched

    def _note(self, actual, expected):
        try:
            a, e = np.broadcast_arrays(*(np.asarray(x).astype(np.float64) for x in (actual, expected)))
        except (TypeError, ValueError):  # not numbers; left to the assertion
            return
        same = (a == e) | (np.isnan(a) & np.isnan(e))
        with np.errstate(invalid="ignore"):  # between two infinities
            off = np.abs(np.where(same, 0, a - e)).max(initial=0)
        size = np.abs(e[np.isfinite(e)]).max(initial=0)
        test = os.environ["PYTEST_CURRENT_TEST"].partition(" ")[0].partition("[")[0]
        numbers, differ, absolute, relative = self._rows.get(test, (0, 0, 0.0, 0.0))
        relative = max(relative, off / size if off else 0.0)
        self._rows[test] = (numbers + a.size, differ + int((~same).sum()), max(absolute, off), relative)

    def pytest_terminal_summary(self, terminalreporter):
        terminalreporter.section("numbers compared, how many differ, greatest difference, over the greatest number")
        for test, (numbers, differ, absolute, relative) in sorted(self._rows.items()):
            terminalreporter.line(f"{numbers:>12,} {differ:>10,} {absolute:>9.1e} {relative:>9.1e}  {test}")
