"""Left and right in the names of classes: whether mirroring an image would make a label wrong, and which two labels then change places.

A side is a word of its own (left, right, L, R, lh, rh, also as in LeftKidney and kidneyL). Beside that, two names are a pair where one letter tells
them apart, l in one and r in the other, at the beginning or the end of a word (lkid and rkid, LV and RV). So L5, a vertebra, has no side.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_SWAPPED = {"left": "right", "l": "r", "lt": "rt", "lh": "rh", "lft": "rgt"}
_SWAPPED |= {other: side for side, other in _SWAPPED.items()}
_LETTER = {"l": "r", "r": "l"}
_UNNAMED = re.compile(r"(class|label)?[ _-]*\d+", re.IGNORECASE)  # class_1 stands for a value that nobody named


def sided(names: Sequence[str]) -> list[str]:
    """The names that have a side."""
    paired = {name for pair in pairs(names) for name in pair}
    return [name for name in names if name in paired or any(word in _SWAPPED for word in _words(name))]


def pairs(names: Sequence[str]) -> list[tuple[str, str]]:
    """Two names that a mirroring from left to right would exchange, each pair once."""
    by_words = {_words(name): name for name in names}
    found = []
    for name in names:
        words = _words(name)
        for i, word in enumerate(words):
            for other in _mirrored(word):
                partner = by_words.get((*words[:i], other, *words[i + 1 :]))
                if partner is not None and (partner, name) not in found and (name, partner) not in found:
                    found.append((name, partner))
    return found


def unnamed(names: Sequence[str]) -> bool:
    """Whether a class has a number for a name, so that nobody knows whether it has a side."""
    return any(_UNNAMED.fullmatch(name) for name in names)


def _words(name: str) -> tuple[str, ...]:
    """The words of a name in small letters: "kidneyL" is ("kidney", "l"), "L5" is ("l5",)."""
    return tuple(word.lower() for word in re.findall(r"[A-Z]+(?![a-z])\d*|[A-Z]?[a-z]+\d*|\d+", name))


def _mirrored(word: str) -> list[str]:
    """What a word may become in a mirror."""
    if word in _SWAPPED:
        return [_SWAPPED[word]]
    first, last = _LETTER.get(word[:1]), _LETTER.get(word[-1:])
    return ([first + word[1:]] if first else []) + ([word[:-1] + last] if last else [])
