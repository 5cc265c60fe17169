"""Repairs text that was cut within a character: servers cut between the two halves of a surrogate pair."""


def mended(text: str) -> str:
    """Returns `text` in valid Unicode: two halves in a row become their character, a half alone becomes U+FFFD."""
    return text if text.isascii() else text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
