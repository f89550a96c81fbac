"""Lists of problems that stay short for models with many layers."""

from __future__ import annotations

import re
from collections.abc import Iterable

#: The most problems, of different kinds, that an error lists.
_MOST = 12
_QUOTED = re.compile(r"'[^']*'")
_NAMES = re.compile(rf"\[[^\[\]]*\]|{_QUOTED.pattern}")


def grouped(problems: Iterable[str]) -> list[str]:
    """Return one problem of each kind, with the number of others. Problems that differ only in layer names are one kind."""
    kinds: dict[str, list[str]] = {}
    for problem in problems:
        kinds.setdefault(_NAMES.sub("", problem), []).append(problem)
    listed = [first + _more(others) for first, *others in kinds.values()]
    rest = len(listed) - _MOST
    return listed[:_MOST] + ([f"and {rest} more problems of other kinds"] if rest > 0 else [])


def capped(texts: Iterable[str], most: int = 3) -> str:
    """Return the first texts, and the number of others."""
    listed = list(texts)
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + more


def _more(others: list[str]) -> str:
    names = [match[0] for match in map(_QUOTED.search, others) if match]
    return f" (and so {len(others)} more: {capped(names)})" if others else ""
