"""The attributes of drawn faces: names, prevalences and co-occurrence.

Attributes are drawn from a forest. Each requested pair is an edge, and the child is drawn given its parent,
so the marginals and every requested agreement are exact, not fitted. Hair is one
variable with five states, because two hair colours, or a hair colour and a bald head, exclude each
other; it is always the root of its tree.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from attnguide.errors import InputError, UnknownNameError

__all__ = ["ATTRIBUTES", "EXPRESSIONS", "PREVALENCE", "AttributeModel", "Pair"]

Pair = tuple[str, str]

#: Default prevalence of each attribute, in the order of the attribute vector.
PREVALENCE: dict[str, float] = {
    "lipstick": 0.5,
    "heavy_makeup": 0.5,
    "smiling": 0.5,
    "mouth_open": 0.5,
    "eyeglasses": 0.25,
    "moustache": 0.25,
    "goatee": 0.2,
    "bushy_eyebrows": 0.5,
    "earrings": 0.5,
    "pale_skin": 0.3,
    "black_hair": 0.28,
    "blond_hair": 0.22,
    "brown_hair": 0.26,
    "bald": 0.08,
    "bangs": 0.25,
    "hat": 0.12,
}

#: The names of the attributes, in the order of the attribute vector.
ATTRIBUTES: tuple[str, ...] = tuple(PREVALENCE)

#: The names of the expressions; a sample's `expression` is an index into this tuple.
EXPRESSIONS: tuple[str, ...] = ("neutral", "happiness", "sadness", "surprise", "fear", "disgust", "anger")

_HAIR = ("black_hair", "blond_hair", "brown_hair", "bald")  # the fifth state is none of these: red or grey
_BALD = _HAIR.index("bald")

# Probabilities of the expressions of a face that does not smile; a face that smiles is happy. If half of the
# mouths are open, each of the six is equally likely.
_SOBER_OPEN = {"surprise": 1 / 3, "fear": 1 / 3, "anger": 1 / 6, "neutral": 1 / 6}
_SOBER_CLOSED = {"sadness": 1 / 3, "disgust": 1 / 3, "anger": 1 / 6, "neutral": 1 / 6}

_DRAWS = len(ATTRIBUTES) + 3  # one uniform per attribute, then hair, hair if it must change, expression


class _Edge(NamedTuple):
    """A child is drawn with probability `table[state of parent]`."""

    child: str
    parent: str  # an attribute, or "hair"
    table: NDArray[np.float64]  # (2,) or, for hair, (5,)


class AttributeModel:
    """The joint distribution of attributes and expression.

    Args:
        cooccurrence: Probability, for a pair of attributes, that both are present or both absent.
        prevalence: Probability, for an attribute, that it is present; others keep their default.
        force: Attributes that are set to a value after everything was drawn.

    Raises:
        UnknownNameError: An attribute does not exist.
        InputError: A probability is outside [0, 1], cannot be attained, the pairs form a cycle, or the
            forced values contradict each other.
    """

    def __init__(
        self,
        cooccurrence: Mapping[Pair, float] | None = None,
        prevalence: Mapping[str, float] | None = None,
        force: Mapping[str, bool] | None = None,
    ) -> None:
        self.prevalence = PREVALENCE | _checked(prevalence or {}, "prevalence")
        hair = [self.prevalence[name] for name in _HAIR]
        if sum(hair) > 1 + 1e-9:
            raise InputError(
                f"prevalence of {', '.join(_HAIR)} adds up to {sum(hair):.3g}: they exclude each other, so "
                "it must be at most 1. Lower one of them."
            )
        self._hair = np.array([*hair, max(0.0, 1 - sum(hair))])
        if self.prevalence["bangs"] > 1 - hair[_BALD] + 1e-9:
            raise InputError(
                f"prevalence of bangs is {self.prevalence['bangs']:.3g} and of bald {hair[_BALD]:.3g}: bangs "
                f"need hair, so at most {1 - hair[_BALD]:.3g} of faces can have them. Lower one of the two."
            )
        self._edges = self._forest(_checked_pairs(cooccurrence or {}))
        self.force, self._hair_allowed = self._forced(force or {})

    def sample(self, n: int, seed: int) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
        """Draw the attributes and expressions of faces 0 to n-1.

        Row i uses its own part of one random stream, so it does not depend on `n`.

        Returns:
            Attributes (n, K) and expressions (n,), indices into `EXPRESSIONS`.
        """
        stream = np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed)))
        u = stream.random((n, _DRAWS))
        hair = _choose(u[:, -3], self._hair)
        value = {name: hair == state for state, name in enumerate(_HAIR)}
        tied = {edge.child: edge for edge in self._edges}
        free = [name for name in ATTRIBUTES if name not in tied and name not in _HAIR]
        for name in [*free, *tied]:
            chance: float | NDArray[np.float64] = self.prevalence[name]
            if name in tied:
                edge = tied[name]
                chance = edge.table[hair if edge.parent == "hair" else value[edge.parent].astype(int)]
            value[name] = u[:, ATTRIBUTES.index(name)] < chance
        self._apply_force(value, hair, u[:, -2])
        attributes = np.stack([value[name] for name in ATTRIBUTES], axis=1)
        return attributes, _expressions(value["smiling"], value["mouth_open"], u[:, -1])

    def _apply_force(
        self, value: dict[str, NDArray[np.bool_]], hair: NDArray[np.int64], u: NDArray[np.float64]
    ) -> None:
        """Set the forced attributes; hair that is not allowed is drawn again among the allowed states."""
        weights = np.where(self._hair_allowed, np.maximum(self._hair, 1e-12), 0.0)
        hair = np.where(self._hair_allowed[hair], hair, _choose(u, weights / weights.sum()))
        for state, name in enumerate(_HAIR):
            value[name] = hair == state
        for name, wanted in self.force.items():
            if name not in _HAIR:
                value[name] = np.full_like(value[name], wanted)
        value["bangs"] &= ~value["bald"]

    def _forced(self, force: Mapping[str, bool]) -> tuple[dict[str, bool], NDArray[np.bool_]]:
        """Return the forced values, and the hair states that they allow."""
        for name in force:
            if name not in PREVALENCE:
                raise UnknownNameError("attribute in force", name, ATTRIBUTES)
        chosen = {name: bool(wanted) for name, wanted in force.items()}
        required = [state for state, name in enumerate(_HAIR) if chosen.get(name)]
        allowed = np.array([chosen.get(name, True) for name in _HAIR] + [True])
        for state in required:
            allowed &= np.arange(5) == state
        if chosen.get("bangs"):
            allowed[_BALD] = False
        if not allowed.any():
            present = [name for name, wanted in chosen.items() if wanted and name in (*_HAIR, "bangs")]
            raise InputError(
                f"force sets {' and '.join(present)}, which exclude each other. Keep one of them."
            )
        return chosen, allowed

    def _forest(self, pairs: dict[Pair, float]) -> list[_Edge]:
        """Order the pairs so that every parent is drawn before its children."""
        links: dict[str, list[tuple[str, Pair | None]]] = {}  # node -> (neighbour, the pair that links them)
        tree = {name: name for name in ("hair", *ATTRIBUTES)}  # node -> representative of its tree

        def link(a: str, b: str, pair: Pair | None) -> None:
            if tree[a] == tree[b]:
                raise InputError(
                    f"cooccurrence[{pair!r}] closes a cycle: other pairs already tie {a} to {b}. Pairs "
                    "must form a forest, in which black_hair, blond_hair, brown_hair, bald and bangs count "
                    "as tied to each other. Remove one of the pairs."
                )
            links.setdefault(a, []).append((b, pair))
            links.setdefault(b, []).append((a, pair))
            old, new = tree[a], tree[b]
            tree.update({name: new for name, representative in tree.items() if representative == old})

        if not any("bangs" in pair and set(pair) & set(_HAIR) for pair in pairs):
            link("hair", "bangs", None)  # bangs need hair, whatever was requested
        for pair, agreement in pairs.items():
            self._check_attainable(pair, agreement)
            link(_node(pair[0]), _node(pair[1]), pair)

        edges: list[_Edge] = []
        seen: set[str] = set()
        for root in ("hair", *ATTRIBUTES):
            agenda = [root] if root in links and root not in seen else []
            for parent in agenda:
                seen.add(parent)
                for child, linked_by in links[parent]:
                    if child not in seen:
                        edges.append(self._edge(parent, child, linked_by, pairs))
                        agenda.append(child)
        return edges

    def _edge(self, parent: str, child: str, pair: Pair | None, pairs: dict[Pair, float]) -> _Edge:
        """Tabulate how likely the child is, given each state of its parent."""
        p_child = self.prevalence[child]
        member = "" if pair is None else pair[0] if pair[1] == child else pair[1]
        both = 0.0 if pair is None else _both(self.prevalence[member], p_child, pairs[pair])
        if parent != "hair":
            p = self.prevalence[parent]
            return _Edge(child, parent, np.array([_ratio(p_child - both, 1 - p), _ratio(both, p)]))
        rest = np.ones(5, dtype=bool)  # the states that are not in the pair
        table = np.zeros(5)
        if member:
            state = _HAIR.index(member)
            rest[state] = False
            table[state] = _ratio(both, self._hair[state])
        if child == "bangs":
            rest[_BALD] = False
        table[rest] = _ratio(p_child - both, float(self._hair[rest].sum()))
        return _Edge(child, parent, table)

    def _check_attainable(self, pair: Pair, agreement: float) -> None:
        a, b = pair
        p, q = self.prevalence[a], self.prevalence[b]
        low, high = max(0.0, p + q - 1), min(p, q)  # the range of P(both)
        if {a, b} <= set(_HAIR) or {a, b} == {"bald", "bangs"}:
            raise InputError(
                f"cooccurrence[{pair!r}] = {agreement:g}: {a} and {b} exclude each other, so at their "
                f"prevalence of {p:g} and {q:g} the attainable range is {1 - p - q:.3g} alone. Remove the "
                "pair."
            )
        if "bangs" in pair and set(pair) & set(_HAIR):
            color = a if b == "bangs" else b
            low = max(0.0, self.prevalence["bangs"] + self.prevalence["bald"] + self.prevalence[color] - 1)
        least, most = 1 - p - q + 2 * low, 1 - p - q + 2 * high
        if not least - 1e-9 <= agreement <= most + 1e-9:
            raise InputError(
                f"cooccurrence[{pair!r}] = {agreement:g} cannot be attained: with a prevalence of {p:g} and "
                f"{q:g} the two agree with a probability between {least:.3g} and {most:.3g}. Choose one in "
                "that range, or bring their prevalences closer together."
            )


def _node(name: str) -> str:
    return "hair" if name in _HAIR else name


def _both(p: float, q: float, agreement: float) -> float:
    """Return P(both present) from the two marginals and the probability that they agree."""
    return (agreement - 1 + p + q) / 2


def _ratio(part: float, whole: float) -> float:
    """Return `part / whole` as a probability, or 0 for a condition that never holds."""
    return min(1.0, max(0.0, part / whole)) if whole > 1e-12 else 0.0


def _choose(u: NDArray[np.float64], weights: NDArray[np.float64]) -> NDArray[np.int64]:
    """Turn uniforms into states drawn with these weights."""
    return np.minimum(np.searchsorted(np.cumsum(weights), u, side="right"), len(weights) - 1)


def _expressions(
    smiling: NDArray[np.bool_], mouth_open: NDArray[np.bool_], u: NDArray[np.float64]
) -> NDArray[np.int64]:
    def pick(table: dict[str, float]) -> NDArray[np.int64]:
        codes = np.array([EXPRESSIONS.index(name) for name in table])
        return codes[_choose(u, np.array(list(table.values())))]

    sober = np.where(mouth_open, pick(_SOBER_OPEN), pick(_SOBER_CLOSED))
    return np.where(smiling, EXPRESSIONS.index("happiness"), sober).astype(np.int64)


def _checked(probabilities: Mapping[str, float], argument: str) -> dict[str, float]:
    for name, value in probabilities.items():
        if name not in PREVALENCE:
            raise UnknownNameError(f"attribute in {argument}", name, ATTRIBUTES)
        if not 0 <= value <= 1:
            raise InputError(f"{argument}[{name!r}] is {value}; a probability lies between 0 and 1.")
    return dict(probabilities)


def _checked_pairs(cooccurrence: Mapping[Pair, float]) -> dict[Pair, float]:
    seen: set[frozenset[str]] = set()
    for pair, value in cooccurrence.items():
        if not isinstance(pair, tuple) or len(pair) != 2:
            raise InputError(
                f"cooccurrence has the key {pair!r}; give two attributes, such as ('lipstick', 'bangs')."
            )
        for name in pair:
            if name not in PREVALENCE:
                raise UnknownNameError("attribute in cooccurrence", name, ATTRIBUTES)
        if pair[0] == pair[1] or frozenset(pair) in seen:
            raise InputError(f"cooccurrence names {pair!r}: give each pair of two different attributes once.")
        seen.add(frozenset(pair))
        if not 0 <= value <= 1:
            raise InputError(f"cooccurrence[{pair!r}] is {value}; a probability lies between 0 and 1.")
    return dict(cooccurrence)
