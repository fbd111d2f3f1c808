"""Near-duplicates among texts.

Two texts are near-duplicates if they are equal but for case, width, punctuation and white space, or, where both have
at least `WORDS` words, if the sets of their word 3-grams overlap by at least 4/5 (Jaccard). Digits and words are kept:
`cipher v17` and `cipher v18` are two texts. Near-duplicates of near-duplicates belong together.

All pairs are found, none is missed by chance: of two sets that overlap by 4/5, the rarest few members of each have one
in common, so only texts that share such a member are compared (prefix and positional filter of PPJoin: Xiao, Wang,
Lin and Yu, "Efficient Similarity Joins for Near Duplicate Detection", WWW 2008).

Cost on one core: 50,000 texts of 20 words take 3 seconds, and 50,000 with a frame of 30 words in common 6; equal texts
cost no more than one.
"""

from __future__ import annotations

import unicodedata
from collections import Counter, defaultdict
from collections.abc import Sequence

WORDS = 8
"""Of shorter texts one word in another place is another question, so only equal ones are near-duplicates."""
COMPARED = 200
"""Words of a text whose 3-grams are compared: its beginning, about as much as a row of the default length holds."""


def clusters(texts: Sequence[str]) -> list[int]:
    """For each text the position of the first text of its cluster: the same number for near-duplicates. (texts,)

    A text that is alone has its own position. Scripts that put no space between words have words as long as their
    sentences; there, only equality is seen.
    """
    first: dict[tuple[str, ...], int] = {}
    same = [first.setdefault(words_of(text), place) for place, text in enumerate(texts)]
    forest = _Forest(len(texts))
    _join({place: grams(words) for words, place in first.items() if len(words) >= WORDS}, forest)
    return [forest.root(place) for place in same]


def words_of(text: str) -> tuple[str, ...]:
    """The words of a text without case, width and punctuation; a text of punctuation alone is its own word."""
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return tuple(folded.translate(_READ).split()) or (folded,)


def grams(words: Sequence[str]) -> frozenset[str]:
    """The distinct runs of three words in the first `COMPARED` words."""
    seen = words[:COMPARED]
    return frozenset(map(" ".join, zip(seen, seen[1:], seen[2:], strict=False)))


class _Read(dict[int, str]):
    """Character → what stays: of punctuation a space, of an invisible mark nothing; a symbol (+ $) is a word."""

    def __missing__(self, code: int) -> str:
        kind = unicodedata.category(chr(code))
        shown = " " if kind[0] in "PZ" or kind == "Cc" else f" {chr(code)} " if kind[0] == "S" else chr(code)
        return self.setdefault(code, "" if kind == "Cf" else shown)


_READ = _Read()


class _Forest:
    """Union-find; the root of a tree is its smallest member."""

    def __init__(self, size: int) -> None:
        self._parent = list(range(size))

    def root(self, member: int) -> int:
        parent = self._parent
        while parent[member] != member:
            parent[member] = member = parent[parent[member]]
        return member

    def unite(self, one: int, other: int) -> None:
        low, high = sorted((self.root(one), self.root(other)))
        self._parent[high] = low


def _join(sets: dict[int, frozenset[str]], forest: _Forest) -> None:
    """Unite the keys of all sets whose Jaccard similarity is at least 4/5.

    Of sizes n and m, that is an overlap o with o / (n + m - o) ≥ 4/5, so 9 o ≥ 4 (n + m). Sets come by size, so a set
    that is met later has n ≥ m, and 5 m ≥ 4 n. Hence o ≥ 4 n / 5 and o ≥ 8 m / 9, and with members sorted, rarest
    first, the first n // 5 + 1 of the one and the first m // 9 + 1 of the other hold their first common member.
    """
    shared = _shared(sets)
    whole = {key: frozenset(members) for key, members in shared.items()}
    # Member → (size, members after it, root) → keys: sets that share a frame are passed over, or united, in one go.
    index: defaultdict[int, dict[tuple[int, int, int], list[int]]] = defaultdict(dict)
    for key in sorted(sets, key=lambda key: (len(sets[key]), key)):
        members, n = shared[key], len(sets[key])
        alone = n - len(members)  # the rarest: they stand before the shared ones and can have no partner
        for place, member in enumerate(members[: max(0, n // 5 + 1 - alone)], 1):
            for (m, after, root), others in index[member].items():
                most = 1 + min(after, len(members) - place)  # of overlap, if this is the first member in common
                if 9 * most < 4 * (n + m) or forest.root(root) == forest.root(key):
                    continue
                if any(9 * len(whole[key] & whole[other]) >= 4 * (n + m) for other in others):
                    forest.unite(root, key)
        for place, member in enumerate(members[: max(0, n // 9 + 1 - alone)], 1):
            index[member].setdefault((n, len(members) - place, forest.root(key)), []).append(key)


def _shared(sets: dict[int, frozenset[str]]) -> dict[int, list[int]]:
    """The members that stand in more than one set, as numbers, rarest first."""
    counts = Counter(member for members in sets.values() for member in members)
    common = sorted((count, member) for member, count in counts.items() if count > 1)
    rank = {member: number for number, (_, member) in enumerate(common)}
    return {key: sorted(rank[member] for member in members if member in rank) for key, members in sets.items()}
