"""Statistics against known values, simulations and properties."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hardener.metrics import (
    Track,
    Way,
    best,
    budget,
    chance_corrected,
    cost,
    crossings,
    detectable,
    holm,
    interval,
    log_area,
    multiplier,
    p_value,
    quote,
    ratio,
    row_weights,
    seed_draws,
    unanswered,
    wilson,
)

STEPS = (0, 1, 2, 3, 4, 6, 9, 13, 19, 28)


def crossing(steps, scores, tau):
    """Of one curve."""
    return crossings(np.array(steps), np.array([scores]), np.array([tau]))[0]


@pytest.mark.parametrize(("n", "upper"), [(60, 6.0), (100, 3.7), (200, 1.9), (313, 1.2), (520, 0.7)])
def test_no_hit_at_all_still_allows_some(n, upper):
    low, high = wilson(0, n)
    assert low == pytest.approx(0, abs=1e-12)
    assert 100 * high == pytest.approx(upper, abs=0.05)


@pytest.mark.parametrize(("n", "points"), [(60, 12.7), (100, 9.8), (200, 6.9), (313, 5.5), (520, 4.3)])
def test_half_width_at_one_half_is_the_textbook_one(n, points):
    low, high = wilson(n / 2, n)
    # Wilson shrinks towards one half; the textbook quotes the normal width, z·√(1/4n).
    assert 100 * (high - low) / 2 == pytest.approx(points, rel=0.04)
    assert (low + high) / 2 == pytest.approx(0.5)


def test_guessing_is_nought_and_perfect_is_one_for_any_number_of_classes():
    for classes in (2, 10, 50):
        assert chance_corrected([1 / classes, 1.0], 1 / classes) == pytest.approx([0, 1])
    assert chance_corrected(0.4, 0.5) < 0


def test_a_curve_linear_in_log_steps_is_crossed_exactly():
    steps = (1, 2, 4, 8, 16, 32)
    scores = [np.log(s) / np.log(32) for s in steps]
    for tau in (0.1, 0.37, 0.5, 0.99):
        assert crossing(steps, scores, tau) == pytest.approx(32**tau)


def test_a_crossing_before_the_first_checkpoint_counts_as_that_checkpoint():
    assert crossing((0, 2, 4), (0.0, 0.8, 0.9), 0.5) == 2
    assert crossing((0, 2, 4), (0.6, 0.8, 0.9), 0.5) == 0


def test_the_first_crossing_counts_even_if_the_curve_falls_again():
    assert crossing((0, 1, 2, 4), (0.0, 0.2, 0.9, 0.1), 0.9) == pytest.approx(2)


def test_a_curve_that_never_gets_there_is_censored():
    assert crossing((0, 1, 2, 4), (0.0, 0.2, 0.3, 0.4), 0.5) == np.inf


def test_weights_give_the_mean_of_the_groups_means_and_never_lose_a_group():
    groups = [0] * 10 + [1] * 40
    weights = row_weights(groups)
    values = np.array([1.0] * 10 + [0.0] * 40)
    assert weights[0] @ values == pytest.approx(0.5)
    assert weights @ values == pytest.approx(np.full(len(weights), 0.5))


def test_equal_seeds_are_drawn_alike_and_the_first_draw_is_the_sample():
    assert (seed_draws((0, 1, 2)) == seed_draws((0, 1, 2))).all()
    assert seed_draws((5, 7))[0].tolist() == [0, 1]


def test_the_interval_covers_the_truth_nineteen_times_in_twenty():
    generator = np.random.default_rng(0)
    weights = row_weights(np.zeros(100))
    hits = 0
    for _ in range(400):
        figure = interval(weights @ (generator.random(100) < 0.4))
        hits += figure.low <= 0.4 <= figure.high
    assert 0.91 <= hits / 400 <= 0.98


def test_the_paired_interval_covers_the_true_difference_and_is_narrower_than_an_unpaired_one():
    generator = np.random.default_rng(1)
    weights = row_weights(np.zeros(100))
    hits, widths, apart = 0, [], []
    for _ in range(300):
        difficulty = generator.random(100)
        one, other = (difficulty < 0.7).astype(float), (difficulty < 0.5).astype(float)
        figure = interval(weights @ one - weights @ other)
        hits += figure.low <= 0.2 <= figure.high
        widths.append(figure.high - figure.low)
        shuffled = interval(weights @ one - weights @ generator.permutation(other))
        apart.append(shuffled.high - shuffled.low)
    assert 0.90 <= hits / 300 <= 0.98
    assert np.mean(widths) < 0.75 * np.mean(apart)


def track(report, selection=None, *, family="full", rate=1e-3, seed=0, kept=None, steps=STEPS, answered=False):
    """One run whose draws are all the sample itself."""
    report = np.asarray(report, dtype=float)
    return Track(
        way=Way(family, rate),
        seed=seed,
        steps=np.asarray(steps[: len(report)]),
        kept=np.ones(len(report), bool) if kept is None else np.asarray(kept),
        selection=report if selection is None else np.asarray(selection, dtype=float),
        report=np.tile(report, (5, 1)),
        utility=np.full(len(report), np.nan),
        answered=answered,
    )


def test_what_is_chosen_on_noise_is_quoted_without_the_winners_curse():
    generator = np.random.default_rng(2)
    selected, quoted = [], []
    for _ in range(300):
        noise = generator.normal(0.3, 0.05, size=(20, 2))
        runs = [track([report], [selection], rate=i + 1) for i, (report, selection) in enumerate(noise)]
        pick = best(runs, usable=False)
        selected.append(pick.score)
        quoted.append(quote(runs, pick, usable=False)[0])
    assert np.mean(selected) > 0.3 + 1.5 * 0.05  # the expected maximum of 20 is +1.87 sd
    assert np.mean(quoted) == pytest.approx(0.3, abs=3 * 0.05 / np.sqrt(300))


def test_a_collapsed_checkpoint_is_no_usable_attack_but_a_raw_one():
    run = track([0.0, 0.4, 0.9], kept=[True, True, False])
    assert best([run], usable=True).step == 1
    assert best([run], usable=False).step == 2
    assert quote([run], best([run], usable=False), usable=True)[0] == 0


def test_a_collapsed_checkpoint_is_not_chosen_even_over_a_score_below_guessing():
    assert best([track([-0.05, 0.9], kept=[True, False])], usable=True).step == 0


def test_of_equal_attacks_the_earliest_step_is_named():
    assert best([track([0.0, 1.0, 1.0, 1.0])], usable=True).step == 1


def test_seeds_are_averaged_where_they_are_present():
    pair = [track([0.0, 0.2, 0.8], seed=0), track([0.0, 0.4], seed=1)]
    assert best(pair, usable=True).score == pytest.approx(0.8)
    assert best(pair, usable=True, at=1).score == pytest.approx(0.3)


def test_the_cost_is_the_median_of_the_seeds_and_censoring_is_never_averaged():
    fast, slow, never = [0, 0, 1], [0, 0, 0, 0, 1], [0, 0, 0, 0, 0]
    tau = np.full(5, 1.0)
    assert cost([track(r, seed=i) for i, r in enumerate((fast, slow, never))], tau, usable=True)[0] == 4
    assert cost([track(r, seed=i) for i, r in enumerate((fast, never))], tau, usable=True)[0] == np.inf


def test_the_cost_is_that_of_the_quickest_rate():
    rates = [track([0, 0, 0, 0, 1], rate=1e-4), track([0, 0, 1], rate=1e-3), track([0, 0, 0, 1], rate=1e-2)]
    assert cost(rates, np.full(5, 1.0), usable=True)[0] == 2


def test_an_unreached_cost_is_a_lower_bound_and_marked():
    figure = multiplier(np.full(5, np.inf), np.full(5, 4.0), bound=64)
    assert (figure.value, figure.censored) == (16, True)
    assert not multiplier(np.full(5, 8.0), np.full(5, 4.0), bound=64).censored


def test_a_draw_in_which_the_original_fails_speaks_against_the_claim():
    assert ratio(np.array([8.0, 8.0, 8.0]), np.array([4.0, np.inf, 0.0])).tolist() == [2, 0, 0]


def test_a_family_that_succeeded_in_full_withholds_no_budget():
    stopped, longer = track([0.0, 1.0, 1.0], family="full", answered=True), track([0] * 8, family="lora")
    assert budget([stopped, longer]) == STEPS[7]
    assert budget([stopped]) == STEPS[2]
    assert unanswered([stopped, longer]) == [longer]


def test_the_area_is_a_mean_over_log_steps_and_an_ended_curve_keeps_its_value():
    steps = np.array([0, 1, 3, 7])  # log₂(1 + step) is 0, 1, 2, 3
    assert log_area(steps, 7) @ np.ones(4) == pytest.approx(1)
    assert log_area(steps, 7) @ [0, 0, 0, 1] == pytest.approx(1 / 6)
    assert log_area(steps, 15) @ [0, 0, 0, 1] == pytest.approx(1.5 / 4)
    assert log_area(steps, 3) @ [0, 0, 0, 1] == pytest.approx(0)
    assert log_area(steps, 3) @ [1, 1, 0, 0] == pytest.approx(1.5 / 2)


def test_holm_multiplies_the_smallest_by_the_number_of_tests_and_keeps_the_order():
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "c": 0.06, "b": 0.06})
    assert holm({"a": 0.9, "b": 0.8}) == {"a": 1.0, "b": 1.0}
    assert holm({}) == {}


def test_a_true_null_is_rejected_once_in_twenty():
    generator = np.random.default_rng(3)
    weights = row_weights(np.zeros(100))
    rejected = sum(p_value(weights @ generator.normal(0, 1, 100)) <= 0.05 for _ in range(400))
    assert 0.02 <= rejected / 400 <= 0.09


def test_the_detectable_difference_is_detected_four_times_in_five():
    generator = np.random.default_rng(4)
    weights = row_weights(np.zeros(200))
    size = detectable(weights @ generator.normal(0, 1, 200), 200)
    assert size == pytest.approx(2.8 / np.sqrt(200), rel=0.15)
    seen = sum(interval(weights @ generator.normal(size, 1, 200)).low > 0 for _ in range(200))
    assert 0.7 <= seen / 200 <= 0.9


def test_where_no_row_differs_the_error_is_that_of_one_row():
    assert detectable(np.zeros(1001), 100) == pytest.approx(0.028, abs=1e-3)


@given(st.dictionaries(st.text(max_size=3), st.floats(0, 1), max_size=6))
def test_holm_never_lowers_a_p_and_never_exceeds_one(p):
    adjusted = holm(p)
    assert all(p[name] <= adjusted[name] <= 1 for name in p)


def test_the_budget_is_what_every_family_was_given():
    runs = [
        track([0] * 8, family="full"),
        track([0] * 4, family="full", rate=1),
        track([0] * 5, family="lora"),
    ]
    assert budget(runs) == STEPS[4]


curve = st.lists(st.floats(0, 1), min_size=len(STEPS), max_size=len(STEPS))


@given(st.lists(curve, min_size=1, max_size=4), curve, st.floats(0.05, 1))
def test_an_attack_that_is_worse_everywhere_changes_neither_score_nor_cost(curves, extra, tau):
    runs = [track(c, rate=i + 1) for i, c in enumerate(curves)]
    worse = track(np.minimum(extra, np.min(curves, axis=0)) - 0.01, rate=99)
    taus = np.full(5, tau)
    assert best([*runs, worse], usable=True) == best(runs, usable=True)
    assert (cost([*runs, worse], taus, usable=True) == cost(runs, taus, usable=True)).all()


@given(st.lists(curve, min_size=2, max_size=5))
def test_more_attacks_never_lower_the_score_on_the_selection_half_nor_raise_the_cost(curves):
    runs = [track(c, rate=i + 1) for i, c in enumerate(curves)]
    assert best(runs, usable=True).score >= best(runs[:-1], usable=True).score
    tau = np.full(5, 0.5)
    assert (cost(runs, tau, usable=True) <= cost(runs[:-1], tau, usable=True)).all()


@given(curve, st.floats(0.01, 1))
def test_a_crossing_lies_between_the_checkpoints_where_the_curve_crosses(scores, tau):
    step = crossing(STEPS, scores, tau)
    reached = [s for s, score in zip(STEPS, scores, strict=True) if score >= tau]
    assert np.isinf(step) == (not reached)
    if reached:
        position = STEPS.index(reached[0])
        assert STEPS[max(position - 1, 0)] - 1e-9 <= step <= reached[0] + 1e-9
