"""Braces in the names of shards."""

from __future__ import annotations

import math
import re

from mlip_kernels.data.packages import require

MOST_SHARDS = 1_000_000


def count(pattern: str) -> int:
    """How many names the braces of ``pattern`` make, without making them; a range counts as if its step were 1."""

    def product(text: str) -> int:
        return math.prod(int(number) for number in re.findall("\0(\\d+)\0", text))

    def inner(match: re.Match[str]) -> str:
        body = match[1]
        if numbers := re.fullmatch(r"(-?\d+)\.\.(-?\d+)(?:\.\.-?\d+)?", body):
            made = abs(int(numbers[2]) - int(numbers[1])) + 1
        elif letters := re.fullmatch(r"([a-zA-Z])\.\.([a-zA-Z])(?:\.\.-?\d+)?", body):
            made = abs(ord(letters[2]) - ord(letters[1])) + 1
        else:
            made = sum(product(part) for part in body.split(","))
        return f"\0{made}\0"

    while (shorter := re.sub(r"\{([^{}]*)\}", inner, pattern)) != pattern:
        pattern = shorter
    return product(pattern)


def expand(pattern: str) -> list[str]:
    """The names that ``pattern`` stands for, each once, in order.

    Raises:
        ValueError: the braces do not match, or make more than `MOST_SHARDS` names.
    """
    try:
        made = count(pattern)
        if made <= MOST_SHARDS:
            return sorted(set(require("braceexpand").braceexpand(pattern)))
    except ValueError as failure:
        raise ValueError(f"{pattern}: the braces cannot be expanded: {failure}") from failure
    raise ValueError(f"{pattern}: expected braces that make at most {MOST_SHARDS:,} shards, got {made:,}")
