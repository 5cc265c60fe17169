"""Lists as iterators: pages are read as they are needed."""

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeAlias, TypeVar

from notecase.retry import Retry, repeat

T = TypeVar("T")

Listing: TypeAlias = AsyncIterator[T]

PAGE = 200
"""Entries in a page: few calls for a long list, and no long wait for the first entry of it."""


async def each(retry: Retry, method: Callable[..., Awaitable[Any]], request: Any) -> AsyncIterator[Any]:
    """Yields the entries of a list method, page by page; each page is requested again while the connection is broken.

    Raises NotecaseError as the method does."""
    request.page_size = request.page_size or PAGE
    while True:
        page = await repeat(retry, lambda: method(request))
        for field, held in page.ListFields():
            if field.message_type is not None:
                for entry in held:
                    yield entry
        request.page_token = page.next_page_token
        if not request.page_token:
            return
