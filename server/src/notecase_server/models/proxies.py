"""Reads the proxy for an address from the environment, as the HTTP client of the openai SDK does."""

import ipaddress
import urllib.parse
import urllib.request

import httpx2

_PORTS = {"http": 80, "https": 443}


def proxy_of(url: httpx2.URL) -> str | None:
    """Returns the proxy's URL, credentials included, or None where the address is asked directly: HTTPS_PROXY or
    HTTP_PROXY by the address's scheme, else ALL_PROXY, unless NO_PROXY excepts its host. Raises ValueError for a proxy
    that does not speak HTTP, such as a SOCKS one."""
    named = urllib.request.getproxies()
    proxy = named.get(url.scheme) or named.get("all")
    if not proxy or any(_excepts(entry.strip().lower(), url) for entry in named.get("no", "").split(",")):
        return None
    proxy = proxy if "://" in proxy else f"http://{proxy}"
    try:
        known = httpx2.URL(proxy).scheme in _PORTS
    except httpx2.InvalidURL:
        known = False
    if not known:
        raise ValueError("the proxy in the environment must have an http:// or https:// URL")
    return proxy


def _excepts(entry: str, url: httpx2.URL) -> bool:
    """Whether an entry of NO_PROXY covers an address: "*", a network or an address, a name with all below it, or, after
    "." or "*.", only what is below it. A scheme before it and a port behind it narrow it."""
    if entry == "*":
        return True
    scheme, _, host = entry.rpartition("://")
    if not host or scheme not in {"", "all", url.scheme}:
        return False
    try:
        return ipaddress.ip_address(url.host) in ipaddress.ip_network(host, strict=False)
    except ValueError:
        pass
    try:
        parts = urllib.parse.urlsplit(f"//{host}")
        name, port = parts.hostname or "", parts.port
    except ValueError:
        return False
    if port not in {None, url.port or _PORTS[url.scheme]}:
        return False
    domain = name.removeprefix("*").removeprefix(".")
    return bool(domain) and ((url.host == domain and name == domain) or url.host.endswith(f".{domain}"))
