"""Reads files of settings, and reports all mistakes in one at once."""

import difflib
import json
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from notecase_server import names
from notecase_server.auth.principal import Role

T = TypeVar("T")

MOST = 10**9
"""The largest number of a setting, and the longest time: 31 years of seconds. More overflows in what takes it."""

MOST_RETRIES = 1000

ROLES: Mapping[str, Role] = {role.name.lower(): role for role in Role}

_KINDS: Mapping[type, str] = {str: "a string", list: "a list", dict: "a table"}


class Mistake(NamedTuple):
    """One setting that is wrong."""

    setting: str
    """An option such as `--tls-key`, for a file with the key in it: `--issuers issuer[0].audience`."""
    text: str
    """A sentence that says what would be right."""


class SettingsError(Exception):
    """Settings cannot be used; it holds every mistake that was found."""

    def __init__(self, mistakes: Iterable[Mistake]) -> None:
        self.mistakes = tuple(mistakes)
        super().__init__("\n".join(f"{mistake.setting}: {mistake.text}" for mistake in self.mistakes))


class Table:
    """A table of a file that is being read. Its methods take a key, return its value, or an empty one where it is
    missing or wrong, and keep the mistake."""

    def __init__(self, values: Mapping[str, Any], place: str, mistakes: list[Mistake]) -> None:
        """`place` begins the names of its settings."""
        self.values = values
        self.mistakes = mistakes
        self._place = place
        self._taken: set[str] = set()

    def check(self, right: bool, key: str, text: str) -> bool:
        """Keeps a mistake unless it is right; returns whether it is."""
        if not right:
            self.mistakes.append(Mistake(f"{self._place}{key}".strip(), text))
        return right

    def done(self) -> None:
        """Keeps a mistake for every key that was not taken: a key that is read over changes what callers may do."""
        for key in sorted(self.values.keys() - self._taken):
            near = difflib.get_close_matches(key, self._taken, n=1)
            rest = f"the nearest is {near[0]}" if near else f"there are {', '.join(sorted(self._taken))}"
            self.check(False, key, f"There is no such key; {rest}.")

    def raise_mistakes(self) -> None:
        """Raises SettingsError if anything was wrong, in any table of the file."""
        if self.mistakes:
            raise SettingsError(self.mistakes)

    def take(self, key: str, kind: type[T]) -> T | None:
        self._taken.add(key)
        value = self.values.get(key)
        if value is None or not self.check(isinstance(value, kind), key, f"This must be {_KINDS.get(kind)}."):
            return None
        return value  # type: ignore[no-any-return]

    def inner(self, key: str, values: Mapping[str, Any]) -> "Table":
        """Returns the table under `key`. Its mistakes are collected with those of this table."""
        return Table(values, f"{self._place}{key}.", self.mistakes)

    def tables(self, key: str) -> Iterator[tuple[str, "Table"]]:
        """The tables [[key]], each with its place in the file."""
        for number, values in enumerate(self.take(key, list) or []):
            place = f"{key}[{number}]"
            if self.check(isinstance(values, dict), place, f"This must be a table: [[{key}]]."):
                yield place, self.inner(place, values)

    def text(self, key: str, *, needed: bool = True) -> str:
        value = self.take(key, str)
        self.check(not needed or key in self.values, key, "This is missing.")
        self.check(value != "", key, "This is empty.")
        return value or ""

    def texts(self, key: str, *, needed: bool = True) -> tuple[str, ...]:
        """One text, or several in a list."""
        self._taken.add(key)
        value = self.values.get(key)
        many = [value] if isinstance(value, str) else value
        if many is None:
            self.check(not needed, key, "This is missing.")
            return ()
        right = isinstance(many, list) and bool(many) and all(isinstance(one, str) and one for one in many)
        return tuple(many) if self.check(right, key, "This must be a string, or a list of strings.") else ()

    def number(self, key: str, *, above: bool = False, whole: bool = False, most: float = 0) -> float | None:
        """Returns a number of at least 0, or above it, and at most `most` or MOST; None if it is missing or wrong."""
        self._taken.add(key)
        value = self.values.get(key)
        kinds = (int,) if whole else (int, float)
        right = isinstance(value, kinds) and not isinstance(value, bool) and 0 <= value <= (most or MOST)
        bounds = f"{'above' if above else 'of at least'} 0 and at most {most or MOST:,}"
        rule = f"This must be a {'whole ' if whole else ''}number {bounds}."
        right = right and not (above and value == 0)
        return value if value is not None and self.check(right, key, rule) else None

    def named_texts(self, key: str) -> Mapping[str, str]:
        """A table from any name to a text."""
        values = self.take(key, dict) or {}
        table = self.inner(key, values)
        return {
            name: value
            for name, value in values.items()
            if table.check(isinstance(value, str), name, "This must be a string.")
        }

    def matching(self, key: str, right: Callable[[str], bool], rule: str, *, needed: bool) -> str:
        value = self.text(key, needed=needed)
        return value if not value or self.check(right(value), key, rule) else ""

    def tenant(self, *, needed: bool = True) -> str:
        return self.matching("tenant", names.is_id, f"A tenant {names.ID_RULE}.", needed=needed)

    def user(self) -> str:
        """Returns the id in `users/{user}`; empty where there is none."""
        rule = "A user must be users/ and an id."
        return self.matching("user", lambda name: bool(names.parse_user(name)), rule, needed=False)[len("users/") :]

    def role(self, *, needed: bool = True) -> Role | None:
        return ROLES.get(
            self.matching("role", ROLES.__contains__, f"A role must be one of {_ROLE_NAMES}.", needed=needed)
        )

    def roles(self, key: str) -> Mapping[str, Role]:
        """A table from any text to the name of a role."""
        values = self.take(key, dict) or {}
        table = self.inner(key, values)
        found = {value: ROLES.get(role) if isinstance(role, str) else None for value, role in values.items()}
        for value, role in found.items():
            table.check(role is not None, value, f"A role must be one of {_ROLE_NAMES}.")
        return {value: role for value, role in found.items() if role is not None}


_ROLE_NAMES = ", ".join(ROLES)


def load(path: Path, option: str, *, toml: bool = False) -> Table:
    """Reads a file that is JSON when its name ends so, and TOML otherwise or with `toml`; then its settings
    are named by their keys alone. Raises SettingsError; `option` names the file."""
    form = "JSON" if path.suffix == ".json" and not toml else "TOML"
    try:
        text = path.read_text(encoding="utf-8-sig")  # some editors begin a file with a mark
        values = json.loads(text) if form == "JSON" else tomllib.loads(text)
    except OSError as error:
        raise SettingsError([Mistake(option, f"{path} cannot be read: {error.strerror}.")]) from None
    except (ValueError, RecursionError) as error:
        raise SettingsError([Mistake(option, f"{path} is not {form}: {error}.")]) from None
    if not isinstance(values, dict):
        raise SettingsError([Mistake(option, f"{path} does not contain a table.")])
    return Table(values, "" if toml else f"{option} ", [])
