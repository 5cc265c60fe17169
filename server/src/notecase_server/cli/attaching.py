"""Files that commands upload."""

import os
import re
import sys

from notecase import Client, v1
from notecase.content import read_once

from notecase_server.cli import screen
from notecase_server.cli.connection import Exit, Refusal

_TYPED = re.compile(r"(.+):([\w.+-]+/[\w.+-]+)")
"""A file and its media type, as in `plan.bin:application/pdf`."""


def split(given: str) -> tuple[str, str]:
    """Returns the file and the media type of FILE:TYPE; the type is empty for FILE alone."""
    typed = None if os.path.exists(given) else _TYPED.fullmatch(given)
    return (typed[1], typed[2]) if typed else (given, "")


async def upload(client: Client, file: str, media_type: str = "", say: str = "as FILE:TYPE") -> v1.Blob:
    """Stores a file, or for `-` standard input. `say` is how the caller may give the media type. In a name that is not
    UTF-8, each byte that does not fit becomes U+FFFD.

    Raises Refusal if it cannot be read, if neither the name nor the content shows its media type, or if the given
    media type is not UTF-8."""
    try:
        if file == "-":
            return await client.upload(read_once(sys.stdin.buffer), media_type)
        name = os.fsencode(os.path.basename(file)).decode(errors="replace")
        return await client.upload(file, media_type, filename=name)
    except OSError as error:
        what = "Standard input" if file == "-" else screen.one_line(file, 400)
        raise Refusal(f"{what} cannot be read: {error.strerror or error}.", Exit.USAGE) from None
    except ValueError:
        what = "standard input" if file == "-" else screen.one_line(file, 400)
        problem = "is not UTF-8" if media_type else "is unknown"
        told = f"The media type of {what} {problem}; set it {say}."
        raise Refusal(told, Exit.USAGE) from None
