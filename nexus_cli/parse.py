"""Flag values from text: every number is checked against its bounds before anything heavy is imported."""

import math
import re
import secrets
from collections.abc import Callable

import typer

SEED_MAX = 2**63 - 1
_WHOLE = re.compile(r"[+-]?[0-9]+")
_NUMBER = re.compile(r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?")
_TIME = re.compile(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+(?:\.\d+)?)s?)?", re.ASCII)
MANY_SEEDS = 1_000_000


def whole(low: int, high: int) -> Callable[[str], int]:
    """A parser of ASCII whole numbers in [low, high]."""
    def parse(text) -> int:
        if not _WHOLE.fullmatch(str(text)) or len(str(text)) > 30 or not low <= int(text) <= high:
            raise typer.BadParameter(f"'{text}' is not a whole number from {low} to {high}")
        return int(text)
    return parse


def number(low: float, high: float, *, above: bool = False) -> Callable[[str], float]:
    """A parser of finite numbers in [low, high], or (low, high] when `above`."""
    def parse(text) -> float:
        value = float(text) if _NUMBER.fullmatch(str(text)) else math.nan
        if not low <= value <= high or (above and value == low):
            bounds = f"above {low:g}, at most {high:g}" if above else f"from {low:g} to {high:g}"
            raise typer.BadParameter(f"'{text}' is not a number {bounds}")
        return value
    return parse


def one_of(*choices: str) -> Callable[[str], str]:
    """A parser of a closed set of words."""
    def parse(text: str) -> str:
        if text not in choices:
            raise typer.BadParameter(f"'{text}' is not one of {', '.join(choices)}")
        return text
    return parse


def named(which: str) -> Callable[[str], str]:
    """A parser of the names in nexus.requests.SAMPLERS, SCHEDULES, ..., which are imported only when one is given."""
    def parse(text: str) -> str:
        from nexus import requests
        return one_of(*getattr(requests, which))(text)
    return parse


def seed(text) -> int:
    """A seed in [0, 2^63), or "random" for a fresh one below 2^32 (short enough to type again)."""
    if text == "random":
        return secrets.randbits(32)
    return whole(0, SEED_MAX)(text)


def seeds(text: str) -> list[int]:
    """Seeds as in "0-9,42": ranges include both ends; none may come twice."""
    found: list[int] = []
    for part in str(text).split(","):
        match = re.fullmatch(r"([0-9]{1,19})(?:-([0-9]{1,19}))?", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if not first <= last <= SEED_MAX or last - first >= MANY_SEEDS or len(found) > MANY_SEEDS:
            raise typer.BadParameter(f"'{text}' is not a list of seeds like 0-9,42 (at most {MANY_SEEDS:,})")
        found.extend(range(first, last + 1))
    if len(set(found)) != len(found):
        raise typer.BadParameter(f"'{text}' names a seed twice")
    return found


def size(text: str) -> tuple[int, int]:
    """WIDTHxHEIGHT in pixels."""
    return _pair(text, "x", whole(1, 65_536), "a size like 64x64")


def grid(text: str) -> tuple[int, int] | str:
    """COLSxROWS, or "auto"."""
    return text if text == "auto" else _pair(text, "x", whole(1, 1000), "a grid like 4x2")


def interval(text: str) -> tuple[float, float]:
    """START-END or START,END as shares of the run, 0 <= START <= END <= 1."""
    pair = _pair(text, "," if "," in str(text) else "-", number(0, 1), "an interval like 0.1-0.9")
    if pair[0] > pair[1]:
        raise typer.BadParameter(f"'{text}' starts after its end")
    return pair


def numbers(count: int, example: str) -> Callable[[str], tuple[float, ...]]:
    """A parser of `count` finite numbers (any of them may be negative) with commas between."""
    def parse(text) -> tuple[float, ...]:
        parts = str(text).split(",")
        if len(parts) != count or not all(_NUMBER.fullmatch(part.removeprefix("-")) for part in parts):
            raise typer.BadParameter(f"'{text}' is not {count} numbers like {example}")
        return tuple(float(part) for part in parts)
    return parse


def margins(text: str) -> str:
    """LEFT,TOP,RIGHT,BOTTOM in pixels or percent."""
    from nexus import requests
    from nexus.errors import UsageError
    try:
        return ",".join(requests.margins(str(text)))
    except UsageError as error:
        raise typer.BadParameter(f"{error}: {error.hint}") from None


def layers(text: str) -> tuple[int, ...]:
    """Layer numbers as in "7,8,9"."""
    return tuple(whole(0, 10_000)(part) for part in str(text).split(","))


def shard(text: str) -> tuple[int, int]:
    """I/N: the I-th of N parts, counting from 0."""
    index, count = _pair(text, "/", whole(0, 1_000_000), "a shard like 0/4")
    if index >= count:
        raise typer.BadParameter(f"'{text}': shards of {count} are 0 to {count - 1}")
    return index, count


def duration(text) -> float:
    """Seconds from "90", "90s", "15m", "3h", "1h30m" or "2d"."""
    match = _TIME.fullmatch(str(text))
    if not match or not any(match.groups()):
        raise typer.BadParameter(f"'{text}' is not a time like 90s, 15m, 3h or 1h30m")
    total = sum(float(part or 0) * unit for part, unit in zip(match.groups(), (86400, 3600, 60, 1), strict=True))
    if not 0 < total <= 366 * 86400:
        raise typer.BadParameter(f"'{text}' is no time above 0 and up to a year")
    return total


def _pair(text, mark: str, parse: Callable, what: str) -> tuple:
    first, found, second = str(text).partition(mark)
    try:
        if found:
            return parse(first), parse(second)
    except typer.BadParameter as error:
        raise typer.BadParameter(f"'{text}' is not {what}: {error.message}") from None
    raise typer.BadParameter(f"'{text}' is not {what}")
