"""Page tokens: the last row's position in its list, signed together with the list's arguments.

So a token can neither be made up nor be used with another parent, filter, order or tenant, nor by another caller.
"""

from collections.abc import Sequence
from typing import Protocol

from itsdangerous import BadData, URLSafeSerializer

from notecase_server import errors
from notecase_server.errors import NotecaseError, Violation
from notecase_server.rpc.caller import caller
from notecase_server.store.contract import Filter, Query

DEFAULT_PAGE_SIZE = 50
MAX_PAGE_SIZE = 1000
MAX_TOKEN = 4 << 10
"""Characters of a token, more than the longest key of a state makes; a signature over megabytes takes its time."""


class ListRequest(Protocol):
    page_size: int
    page_token: str


class Pages:
    """Makes and reads the tokens of one store."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret

    def query(self, request: ListRequest, *about: str, where: Filter | None = None) -> Query:
        """The page a request asks for; `about` is all that makes this list another than the next one.

        Raises NotecaseError PAGE_TOKEN_INVALID for the token, INVALID_FIELD for the size, or for both."""
        size = Violation("page_size", f"must be 0 (for {DEFAULT_PAGE_SIZE}) to {MAX_PAGE_SIZE}")
        wrong = [] if 0 <= request.page_size <= MAX_PAGE_SIZE else [size]
        after: tuple[str | int, ...] | None = None
        if request.page_token:
            try:
                after = self.position(request.page_token, *about)
            except NotecaseError as invalid:
                raise (errors.invalid([*wrong, *invalid.violations]) if wrong else invalid) from None
        if wrong:
            raise errors.invalid(wrong)
        return Query(request.page_size or DEFAULT_PAGE_SIZE, after, where)

    def position(self, token: str, *about: str) -> tuple[str | int, ...]:
        """Returns the position that `token` made that token of. Raises NotecaseError PAGE_TOKEN_INVALID."""
        try:
            if len(token) > MAX_TOKEN:
                raise BadData("it is too long")
            return tuple(self._signer(about).loads(token))
        except BadData:
            raise errors.page_token_invalid() from None

    def token(self, position: Sequence[str | int] | None, *about: str) -> str:
        """For the position after which a page ended; "" when nothing follows."""
        return "" if position is None else str(self._signer(about).dumps(list(position)))

    def _signer(self, about: Sequence[str]) -> URLSafeSerializer:
        subject = caller.get().principal.subject
        return URLSafeSerializer(self._secret, salt="\0".join((subject, *about)).encode())
