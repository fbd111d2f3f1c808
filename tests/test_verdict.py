"""The truth table of the verdict, and what follows from each word."""

import pytest

from hardener.report import Interval, Measures
from hardener.verdict import BENIGN_LOST, CERTIFYING, COLLAPSE, UTILITY_LOST, cap, decide, exit_code, meets, pushes


def around(value, spread=0.02, censored=False):
    return Interval(value=value, low=value - spread, high=value + spread, censored=censored)


def figures(w=0.1, m=16.0, raw_w=None, raw_m=None, w_u=0.9, **more):
    """Measures of an attack that gets `w` at `m` times the cost; the raw figures follow unless given."""
    raw_w, raw_m = w if raw_w is None else raw_w, m if raw_m is None else raw_m
    fields = {
        "w_original": around(w_u),
        "w_hardened": around(w),
        "w_raw_original": around(w_u),
        "w_raw_hardened": around(raw_w),
        "delta_w": around(w_u - w),
        "delta_w_raw": around(w_u - raw_w),
        "multiplier": None if m is None else around(m),
        "multiplier_raw": None if raw_m is None else around(raw_m),
    }
    return Measures(**{**fields, **more})


TABLE = [
    ("protected", figures()),
    ("protected", figures(w=0.42)),  # upper bound 0.44 < 0.45
    ("raises cost", figures(w=0.44)),  # upper bound 0.46
    ("raises cost", figures(m=3.9)),
    ("raises cost", figures(m=4.01)),  # lower bound 3.99
    ("raises cost", figures(m=None)),
    ("raises cost", figures(w=0.9, m=2.1)),
    ("no measurable protection", figures(w=0.9, m=2.01)),  # lower bound 1.99: a placebo earns that
    ("no measurable protection", figures(w=0.9, m=None)),
    ("raises cost", figures(w=0.78, m=1.0)),  # lower bound of ΔW 0.10 > 0.09
    ("no measurable protection", figures(w=0.8, m=1.0)),  # lower bound 0.08
    ("raises cost", figures(raw_w=0.9, raw_m=16.0)),  # raw agrees on the cost alone
    ("raises cost", figures(raw_w=0.9, raw_m=1.0)),  # by collapse
    ("raises cost", figures(raw_w=0.1, raw_m=1.0)),
    ("broken", figures(utility_kept=around(0.87))),
    ("protected", figures(utility_kept=around(0.89))),  # upper bound 0.91: a flag, not broken
    ("broken", figures(w=0.9, m=1.0, utility_kept=around(0.5))),
    ("inconclusive", figures(w_u=0.49)),
    ("inconclusive", figures(w_u=0.49, utility_kept=around(0.5))),  # first match wins
    ("inconclusive", Measures()),
]


@pytest.mark.parametrize(("word", "measures"), TABLE)
def test_first_match_wins(word, measures):
    assert decide(measures, {"budget": "ok"})[0] == word


def test_a_failed_check_comes_before_everything_and_is_the_reason():
    word, reason, _ = decide(figures(utility_kept=around(0.5)), {"budget": "too short", "rows": "ok"})
    assert (word, reason) == ("inconclusive", "too short")


def test_fragility_is_not_called_protection():
    word, reason, _ = decide(figures(raw_w=0.9, raw_m=1.0), {})
    assert word == "raises cost"
    assert COLLAPSE in reason
    assert COLLAPSE not in decide(figures(), {})[1]
    assert COLLAPSE not in decide(figures(w=0.9, m=1.0), {})[1]


@pytest.mark.parametrize(
    ("word", "measures"),
    [
        ("inconclusive", figures()),
        ("inconclusive", figures(w=0.44)),
        ("no measurable protection", figures(w=0.9, m=1.0)),
        ("broken", figures(utility_kept=around(0.5))),
        ("inconclusive", figures(w_u=0.49)),
    ],
)
def test_a_missing_condition_withholds_certificates_alone(word, measures):
    met, missing = {"seeds": "ok"}, {"seeds": "one seed", "rates": "ok"}
    free = decide(measures, {}, met)
    assert free == decide(measures, {})
    held = decide(measures, {}, missing)
    assert held[0] == word
    if free[0] in CERTIFYING:
        assert held[1] == f"cannot certify “{free[0]}”: one seed"
    else:
        assert held == free


def test_a_failed_check_is_told_before_a_missing_condition():
    assert decide(figures(), {"budget": "too short"}, {"seeds": "one seed"})[1] == "too short"


@pytest.mark.parametrize(
    ("word", "measures", "p"),
    [
        ("raises cost", figures(w=0.6, m=1.0), 0.05),
        ("no measurable protection", figures(w=0.6, m=1.0), 0.051),  # by chance, one of many families differs
        ("raises cost", figures(w=0.6, m=2.1), 1.0),  # the cost needs no p
        ("protected", figures(), 0.5),
        ("raises cost", figures(w=0.6, m=1.0), None),
    ],
)
def test_a_difference_counts_for_a_family_only_where_it_holds_among_many(word, measures, p):
    assert decide(measures, {}, p=p)[0] == word


def test_a_censored_multiplier_is_printed_as_a_bound():
    assert "≥ 16.0 times" in decide(figures(multiplier=around(16, censored=True)), {})[1]


def test_prices_are_flagged_by_their_lower_bound():
    measures = figures(utility_kept=around(0.91), benign_kept=around(0.91))
    assert decide(measures, {})[2] == (UTILITY_LOST, BENIGN_LOST)
    assert decide(figures(utility_kept=around(0.93), benign_kept=around(0.93)), {})[2] == ()


@pytest.mark.parametrize("preset", ["quick", "reduced-cpu"])
def test_a_screen_never_certifies(preset):
    for word in ("protected", "raises cost"):
        capped, reason = cap(word, "because", preset)
        assert capped == "inconclusive"
        assert "only screens" in reason
        assert "because" in reason
        assert cap(word, "because", "standard") == (word, "because")
    for word in ("broken", "no measurable protection", "inconclusive"):
        assert cap(word, "because", preset) == (word, "because")


GATES = ("no-measurable-protection", "raises-cost", "protected")


def test_each_gate_is_met_by_its_word_and_the_stronger_ones():
    words = ("no measurable protection", "raises cost", "protected")
    assert [[meets(word, gate) for word in words] for gate in GATES] == [
        [True, True, True],
        [False, True, True],
        [False, False, True],
    ]
    assert not any(meets(word, gate) for word in ("broken", "inconclusive") for gate in (*GATES, None))


@pytest.mark.parametrize(
    ("word", "flags", "gate", "code"),
    [
        ("protected", (), None, 0),
        ("raises cost", (BENIGN_LOST,), None, 0),
        ("no measurable protection", (), None, 0),
        ("no measurable protection", (UTILITY_LOST,), None, 1),
        ("broken", (UTILITY_LOST,), None, 1),
        ("inconclusive", (), None, 4),
        ("inconclusive", (UTILITY_LOST,), None, 4),
        ("protected", (), "protected", 0),
        ("protected", (UTILITY_LOST,), "protected", 0),
        ("raises cost", (), "protected", 1),
        ("raises cost", (), "raises-cost", 0),
        ("no measurable protection", (), "raises-cost", 1),
        ("broken", (), "no-measurable-protection", 1),
        ("inconclusive", (), "no-measurable-protection", 4),
    ],
)
def test_exit_codes_and_what_is_pushed(word, flags, gate, code):
    assert exit_code(word, flags, gate) == code
    assert pushes(word, flags, gate) == (code == 0)
