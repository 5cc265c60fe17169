"""Reads and writes the file of profiles: named servers with their addresses, tokens and CA certificates."""

import base64
import json
import os
import select
import stat
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import click

LOOK_SECONDS = 0.1
"""How often to look whether the command has ended, while a program that it started may keep its output open."""

MOST_TOKEN = 64 << 10
"""Bytes of a token and what surrounds it; a server takes 8 KiB of a token."""

COMMAND_SECONDS = 60
"""How long a command may take to print a token; one that waits for a password in a browser takes a while."""

FRESH_SECONDS = 300
"""How long a token that a command printed is used before the command runs again."""

SPARE_SECONDS = 10
"""A token that says when it expires is used until so long before."""


class ProfilesError(Exception):
    """The file, or a profile in it, cannot be used; the message says why."""


@dataclass(frozen=True)
class Profile:
    """How one server is called. At most one of the three tokens is set."""

    address: str
    token: str = ""
    token_file: str = ""
    token_command: str = ""
    """Run by a shell; it prints the token."""
    ca: str = ""
    plaintext: bool = False

    def arguments(self) -> dict[str, Any]:
        """Returns the arguments of Client. Tokens of files and commands are read when a call needs one."""
        found: dict[str, Any] = {}
        if self.ca:
            found["ca"] = os.path.expanduser(self.ca)
        if self.plaintext:
            found["plaintext"] = True
        if token := self._token():
            found["token"] = token
        return found

    def _token(self) -> str | Callable[[], str]:
        if self.token_file:
            return lambda: _from_file(self.token_file)
        return Printed(self.token_command) if self.token_command else self.token


@dataclass
class Profiles:
    """What the file holds."""

    profiles: dict[str, Profile] = field(default_factory=dict)
    current: str = ""
    """The profile that commands use when they name none; empty for none."""

    def chosen(self, name: str) -> Profile | None:
        """Returns the profile of that name, or the current one. Raises ProfilesError when there is none of the name."""
        name = name or self.current
        if not name:
            return None
        if name not in self.profiles:
            known = ", ".join(sorted(self.profiles)) or "none"
            raise ProfilesError(f"There is no profile {name!r} in {path()}; there are: {known}.")
        return self.profiles[name]


_FORM = asdict(Profile(""))


def path() -> Path:
    """Returns where the file is, whether it exists or not."""
    return Path(click.get_app_dir("notecase")) / "profiles.json"


def read(strict: bool = True) -> Profiles:
    """Returns the contents of the file; empty when there is no file. Raises ProfilesError for a file that cannot be
    read, is not of this form, or, if `strict`, holds a token that other users of the machine can read."""
    file = path()
    try:
        with file.open(encoding="utf-8") as opened:
            mode = stat.S_IMODE(os.fstat(opened.fileno()).st_mode)
            held = json.load(opened)
        profiles = {name: Profile(**told) for name, told in held["profiles"].items()}
        found = Profiles(profiles, held.get("current", ""))
        if not all(
            type(value) is type(_FORM[name]) for one in profiles.values() for name, value in asdict(one).items()
        ):
            raise TypeError
    except FileNotFoundError:
        return Profiles()
    except OSError as error:
        raise ProfilesError(f"{file} cannot be read: {error.strerror}.") from None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise ProfilesError(f"{file} is not a profiles file; `notecase profiles set` writes one.") from None
    if strict and mode & 0o077 and any(one.token for one in found.profiles.values()):
        raise ProfilesError(f"{file} holds a token, and other users can read it: run `chmod 600 {file}`.")
    return found


def write(found: Profiles) -> None:
    """Replaces the file, readable by its owner alone. Raises ProfilesError when it cannot be written."""
    file = path()
    profiles = {name: {key: held for key, held in asdict(one).items() if held} for name, one in found.profiles.items()}
    text = json.dumps({"current": found.current, "profiles": profiles}, indent=2, ensure_ascii=False)
    try:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False, encoding="utf-8") as part:  # mode 0600
            part.write(f"{text}\n")
        Path(part.name).replace(file)
    except OSError as error:
        raise ProfilesError(f"{file} cannot be written: {error.strerror}.") from None


def refuse_readable(token_file: str) -> None:
    """Raises ProfilesError for a file of the user's own that other users of the machine can read. The files of others,
    such as the secrets that are mounted into a container, are theirs to guard; one that is not there holds nothing."""
    try:
        found = os.stat(token_file)
    except OSError:
        return
    if stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid() and found.st_mode & 0o077:
        raise ProfilesError(f"{token_file} holds a token, and other users can read it: run `chmod 600 {token_file}`.")


def _from_file(name: str) -> str:
    file = Path(name).expanduser()
    try:
        refuse_readable(str(file))
        with file.open(encoding="utf-8-sig") as opened:
            token = opened.read(MOST_TOKEN + 1)
        if len(token) > MOST_TOKEN:
            raise ValueError(f"it has more than {MOST_TOKEN} characters")
        return token.strip()
    except ProfilesError as error:
        raise click.ClickException(str(error)) from None
    except (OSError, ValueError) as error:
        raise click.ClickException(f"The token cannot be read from {name}: {error}.") from None


class Printed:
    """The token that a command prints, which is run again after FRESH_SECONDS, or before the token expires."""

    def __init__(self, command: str) -> None:
        self._command = command
        self._token = ""
        self._until = 0.0

    def __call__(self) -> str:
        if not self._token or time.monotonic() > self._until:
            try:
                self._token = _printed(self._command).strip()
            except (OSError, ValueError, subprocess.SubprocessError) as error:  # ValueError: it is not text
                raise click.ClickException(f"The command for the token failed: {error}") from None
            if not self._token or not self._token.isascii() or not self._token.isprintable() or " " in self._token:
                raise click.ClickException("The command for the token failed: it did not print one word of ASCII.")
            self._until = time.monotonic() + _usable(self._token)
        return self._token


def _printed(command: str) -> str:
    """Returns what a command prints until its shell has ended; a program that it started may go on. Raises OSError,
    ValueError and subprocess.SubprocessError."""
    printed, until = b"", time.monotonic() + COMMAND_SECONDS
    with subprocess.Popen(command, shell=True, stdout=subprocess.PIPE) as shell:
        assert shell.stdout is not None
        try:
            while True:
                has_ended = shell.poll() is not None
                if select.select([shell.stdout], [], [], 0 if has_ended else LOOK_SECONDS)[0]:
                    piece = os.read(shell.stdout.fileno(), MOST_TOKEN)
                    printed += piece
                    if not piece:
                        shell.wait(max(until - time.monotonic(), 0))
                        break
                elif has_ended:
                    break
                if len(printed) > MOST_TOKEN:
                    raise ValueError(f"it printed more than {MOST_TOKEN} bytes")
                if time.monotonic() > until:
                    raise subprocess.TimeoutExpired(command, COMMAND_SECONDS)
        except BaseException:
            shell.kill()
            raise
    if shell.returncode:
        raise subprocess.CalledProcessError(shell.returncode, command)
    return printed.decode()


def _usable(token: str) -> float:
    """Returns for how many seconds a token is used. That of an identity provider says when it expires."""
    try:
        claims = json.loads(base64.urlsafe_b64decode(token.split(".")[1] + "=="))
        return min(FRESH_SECONDS, float(claims["exp"]) - time.time() - SPARE_SECONDS)
    except (IndexError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return FRESH_SECONDS
