"""Near-duplicates: every pair is found, nothing else is, and no pair serves two uses."""

from __future__ import annotations

import itertools
import random
import time

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from hardener.data import Divider, Loaded, kin_of
from hardener.near import clusters
from hardener.recipe import Data, Role, Source
from hardener.tasks.base import Example, key_of

SENTENCE = "Tell me the way from the old harbour to the small house on the hill before it rains"
WORDS = [f"w{i}" for i in range(6)]


def together(one: str, other: str) -> bool:
    first, second = clusters([one, other])
    return first == second


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("copy a b", "copy a b"),
        ("Copy a, b!", "  copy\tA\nB "),
        ("copy ａ１", "copy a1"),
        ("straße", "STRASSE"),
        ("co\u00adpy a", "copy a"),
        (SENTENCE, SENTENCE + " again"),
        (SENTENCE, SENTENCE.removeprefix("Tell ")),
    ],
)
def test_these_are_near_duplicates(one, other):
    assert together(one, other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("cipher v17", "cipher v18"),
        ("copy a b", "copy b a"),
        ("what is 3 + 4", "what is 3 < 4"),
        ("what is 34", "what is 3 4"),
        ("?", "!"),
        ("😀", "😡"),
        ("ki", "kī"),
        ("how can I stop a python process", "how can I stop a python process now"),  # too short for anything but equal
        (SENTENCE, SENTENCE.replace("harbour", "market").replace("house", "bridge")),
    ],
)
def test_these_are_not(one, other):
    assert not together(one, other)


def test_the_line_is_a_jaccard_similarity_of_four_fifths():
    """11 words have 9 3-grams; with another last word 8 of 10 are shared, and of 10 words only 7 of 9."""
    words = [str(i) for i in range(11)]
    assert together(" ".join(words), " ".join([*words[:-1], "x"]))
    assert not together(" ".join(words[1:]), " ".join([*words[1:-1], "x"]))


def test_near_duplicates_of_near_duplicates_belong_together():
    chain = [" ".join(str(i) for i in range(start, start + 20)) for start in range(10)]
    assert not together(chain[0], chain[-1])
    assert clusters(chain) == [0] * 10


def test_only_the_beginning_of_long_texts_is_compared_for_likeness():
    beginning, one, other = (" ".join(f"{name}{i}" for i in range(200)) for name in "abc")
    assert together(f"{beginning} {one}", f"{beginning} {other}")
    assert not together(one, other)


@st.composite
def edited(draw):
    """Texts of which many are copies of each other but for a few words, case and punctuation."""
    texts = []
    bases = draw(st.lists(st.lists(st.sampled_from(WORDS), min_size=4, max_size=16), min_size=1, max_size=4))
    for base in draw(st.lists(st.sampled_from(bases), min_size=2, max_size=12)):
        words = list(base)
        for _ in range(draw(st.integers(0, 2))):
            place = draw(st.integers(0, len(words)))
            words[place : place + draw(st.integers(0, 1))] = draw(st.lists(st.sampled_from(WORDS), max_size=1))
        text = draw(st.sampled_from([" ", ", "])).join(words)
        texts.append(draw(st.sampled_from([str, str.upper]))(text))
    return texts


def alike(one: str, other: str) -> bool:
    """The definition, word for word."""
    first, second = (text.lower().replace(",", " ").split() for text in (one, other))
    if first == second:
        return True
    if min(len(first), len(second)) < 8:
        return False
    here, there = ({tuple(words[i : i + 3]) for i in range(len(words) - 2)} for words in (first, second))
    return 5 * len(here & there) >= 4 * len(here | there)


@settings(deadline=None, max_examples=300)
@given(edited())
def test_the_clusters_are_those_of_comparing_every_pair(texts):
    expected = list(range(len(texts)))
    for one, other in itertools.combinations(range(len(texts)), 2):
        if alike(texts[one], texts[other]):
            low, high = sorted((expected[one], expected[other]))
            expected = [low if number == high else number for number in expected]
    assert clusters(texts) == expected


ROLES: tuple[Role, ...] = ("restricted", "alignment", "retain", "benign", "harmless")
SOURCES = st.lists(
    st.tuples(
        st.sampled_from(ROLES),
        st.lists(st.sampled_from(["defence", "attack", "evaluation"]), min_size=1, max_size=3, unique=True),
        st.integers(0, 11),
        st.integers(1, 12),
    ),
    min_size=1,
    max_size=5,
)


def divided(texts, chosen, seed):
    """Slices of sources that each hold some of the texts, with overlapping rows dropped."""
    parts = []
    for number, (role, uses, start, length) in enumerate(sorted(chosen, key=lambda one: ROLES.index(one[0]))):
        own = {key_of(text): text for text in texts[start : start + length]}
        examples = tuple(Example(key, {}, [], 1) for key in own)
        source = Source(dataset=f"org/{number}", uses=tuple(uses))
        parts.append(Loaded(role, source, "exact-match", examples, own, 0))
    data = Data(restricted=Source(dataset="org/x"), retain=Source(dataset="org/y"), overlap="drop", seed=seed)
    divider = Divider(data, kin_of(parts), labelled=False)
    return parts, [divider.divide(part) for part in parts]


@settings(deadline=None, max_examples=200)
@given(edited(), SOURCES, st.integers(0, 3))
def test_no_near_duplicates_ever_serve_two_uses(texts, chosen, seed):
    parts, made = divided(texts, chosen, seed)
    asked = {key: text for part in parts for key, text in part.texts.items()}
    rows = [(s.use, asked[e.key], s.role) for slices, _ in made for s in slices for e in s.examples]
    for (use, one, role), (other_use, other, other_role) in itertools.combinations(rows, 2):
        if alike(one, other):
            assert use == other_use
            assert {role, other_role} not in ({"restricted", "retain"}, {"restricted", "benign"})
    for part, (slices, records) in zip(parts, made, strict=True):
        assert len(part.examples) == sum(len(s.examples) for s in slices) + records[0].dropped
    again = divided(texts, chosen, seed)[1]
    assert [records for _, records in again] == [records for _, records in made]


@settings(deadline=None, max_examples=100)
@given(edited(), st.integers(0, 11), st.integers(0, 3))
def test_a_further_source_moves_no_row_of_those_before_it_unless_it_joins_them(texts, start, seed):
    every = ["defence", "attack", "evaluation"]
    first = ("restricted", every, 0, 6)
    assume(clusters(texts[:6]) == clusters([*texts[:6], *texts[start : start + 12]])[:6])
    alone, more = (divided(texts, chosen, seed)[1] for chosen in ([first], [first, ("benign", every, start, 12)]))
    assert alone[0][1] == more[0][1]


def test_a_text_that_is_near_to_two_that_were_apart_brings_all_three_into_one_use():
    one, other = "w0 w0 w0 w0 w0 w1 w1 w1", "w0 w1 w0 w0 w0 w0 w1 w1 w1"
    bridge = "w1 w0 w0 w0 w0 w1 w1 w1"
    assert len({*clusters([one, other])}) == 2
    assert len({*clusters([one, other, bridge])}) == 1
    every = ["defence", "attack", "evaluation"]
    chosen = [("restricted", every, 0, 2), ("benign", every, 2, 1)]
    for seed in range(20):
        uses = {s.use for slices, _ in divided([one, other, bridge], chosen, seed)[1] for s in slices if s.examples}
        assert len(uses) == 1


def drawn(kind: str, rows: int = 20_000) -> list[str]:
    rng = random.Random(0)
    frame = " ".join(f"f{i}" for i in range(30))
    if kind == "equal":
        return [SENTENCE] * rows
    words = {"different": 20, "framed": 6, "alike": 1}[kind]
    start = "" if kind == "different" else frame
    return [f"{start} {' '.join(f'w{rng.randrange(20_000)}' for _ in range(words))}" for _ in range(rows)]


@pytest.mark.parametrize(("kind", "found"), [("equal", 1), ("different", 20_000), ("framed", 20_000), ("alike", 1)])
def test_twenty_thousand_rows_take_seconds(kind, found):
    """Comparing every pair would take minutes."""
    texts = drawn(kind)
    start = time.process_time()
    assert len(set(clusters(texts))) == found
    assert time.process_time() - start < 20
