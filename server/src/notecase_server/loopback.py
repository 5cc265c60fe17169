"""Distinguishes addresses that only this machine can reach from others."""

import ipaddress


def is_loopback(listen: str) -> bool:
    """Whether only this machine can reach that address."""
    host = listen.rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
