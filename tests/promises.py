"""What notecase promises, as docs/promises.toml has it."""

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
FILE = ROOT / "docs" / "promises.toml"


class Mutation(NamedTuple):
    """A change of one file that breaks a promise."""

    file: str
    text: str
    becomes: str
    fails: Sequence[str]
    """Of these tests at least one fails then: files or node ids."""

    def applied(self, source: str) -> str:
        """The file's source with the change. ValueError when it does not have the text exactly once."""
        if source.count(self.text) != 1:
            raise ValueError(f"{self.file} has {source.count(self.text)} times {self.text!r}, and not once")
        return source.replace(self.text, self.becomes)


class Promise(NamedTuple):
    says: str
    tests: Sequence[str]
    mutations: Sequence[Mutation]


def promises() -> list[Promise]:
    """Reads all of them. Raises TypeError and KeyError for a file in another form."""
    return [
        Promise(row["says"], row["tests"], [Mutation(**made) for made in row.get("mutation", ())])
        for row in tomllib.loads(FILE.read_text())["promise"]
    ]
