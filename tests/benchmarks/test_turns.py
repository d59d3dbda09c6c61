"""Measuring in turns, and the verdict on what was measured."""

import numpy as np
import pytest

from ssast.benchmarks.turns import compare_turns, median_ratio, take_turns


def test_none_is_always_measured_first():
    order = []
    measured = take_turns("ABC", 3, lambda name, turn: order.append(name) or (name, turn))
    assert "".join(order) == "ABCCBAABC"
    assert measured == [[(name, turn) for turn in range(3)] for name in "ABC"]


def test_a_drift_of_the_machine_drops_out_of_the_ratio():
    machine = np.array([1.0, 0.5, 0.25])
    assert median_ratio(30 * machine, 10 * machine) == 3.0


def turns(rng, count, ratio=1.0, spread=0.01):
    """Clips/s of two, on a machine that slows down by a third meanwhile."""
    drift = np.linspace(1, 0.67, count)
    return [2000 * side * drift * np.exp(spread * rng.normal(size=count)) for side in (1.0, ratio)]


def test_equal_sides_are_called_different_as_seldom_as_promised():
    rng = np.random.default_rng(0)
    verdicts = [compare_turns(*turns(rng, 5)) for _ in range(400)]
    wrong = sum(verdict.decision != "no difference" for verdict in verdicts)
    assert 4 <= wrong <= 36  # 20 expected at 95%


def test_a_real_difference_is_found_and_covered():
    rng = np.random.default_rng(1)
    verdicts = [compare_turns(*turns(rng, 5, ratio=1.1)) for _ in range(100)]
    assert all(verdict.decision == "faster" for verdict in verdicts)
    assert sum(verdict.low <= 0.1 <= verdict.high for verdict in verdicts) >= 88
    slower = compare_turns(*reversed(turns(rng, 5, ratio=1.1)))
    assert slower.decision == "slower" and slower.high < 0


def test_verdict_by_hand():
    """Log ratios -0.01, 0.02, 0.05: mean 0.02, deviation 0.03, t 4.303, so 0.02 +- 0.0745."""
    verdict = compare_turns([100.0] * 3, [100 * np.exp(ratio) for ratio in (-0.01, 0.02, 0.05)])
    assert np.log1p([verdict.change, verdict.low, verdict.high]) == pytest.approx([0.02, -0.05453, 0.09453], abs=1e-5)


@pytest.mark.parametrize("count", [0, 1, 2])
def test_few_turns_cannot_tell(count):
    verdict = compare_turns([100.0] * count, [200.0] * count)
    assert (verdict.decision, verdict.change) == ("cannot tell", None)


def test_turns_must_be_whole():
    with pytest.raises(ValueError, match="3 turns of A and 2 of B"):
        compare_turns([1.0] * 3, [1.0] * 2)
    with pytest.raises(ValueError, match="above 0"):
        compare_turns([1.0] * 3, [1.0, 0.0, 1.0])
