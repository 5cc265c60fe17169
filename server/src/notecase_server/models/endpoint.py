"""Checks the settings of a provider before anything is loaded or connected."""

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import httpx2

from notecase_server.models.proxies import proxy_of

OPENAI_URL = "https://api.openai.com/v1"


class Endpoint(NamedTuple):
    """The base URL of a provider, and what is sent to it with every request."""

    url: httpx2.URL
    """With its query."""
    key: str
    """Never empty."""
    proxy: str | None
    """The URL of the proxy that the environment names for it."""


def endpoint_of(api_key: str, base_url: str | None, headers: Mapping[str, str] = MappingProxyType({})) -> Endpoint:
    """Returns what the settings come to. Raises ValueError, without the key in it, when the key, a header, the URL or
    the proxy cannot work."""
    key = api_key or "none"
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise ValueError("the API key contains a space, a line break or a character outside ASCII")
    for name, value in headers.items():
        if not re.fullmatch(r"[\w!#$%&'*+.^`|~-]+", name, re.ASCII) or not (value.isascii() and value.isprintable()):
            raise ValueError("a header contains a line break or an invalid character")
    url = _checked_url(base_url or OPENAI_URL)
    return Endpoint(url, key, proxy_of(url))


def _checked_url(base_url: str) -> httpx2.URL:
    """Raises ValueError for what cannot be a base URL, or would put a secret where URLs are logged."""
    try:
        url = httpx2.URL(base_url)
        url.host.encode("idna")
    except (httpx2.InvalidURL, UnicodeError):
        raise ValueError("the base URL is not a valid URL") from None
    if url.scheme not in {"http", "https"} or not url.host:
        raise ValueError("the base URL must begin with http:// or https:// and name a host")
    if url.userinfo or url.fragment:
        raise ValueError("the base URL must not contain credentials or a fragment")
    return url
