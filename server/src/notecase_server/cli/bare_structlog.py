"""Imports structlog without rich; it is to be imported before anything else that imports structlog.

It imports all of rich where that is installed, for tracebacks that the server never writes, and a start of the
server would take 50 ms more.
"""

import sys

_rich = sys.modules.get("rich")
sys.modules["rich"] = None  # type: ignore[assignment]  # which Python takes for a module that cannot be found
import structlog  # noqa: E402, F401

if _rich is None:
    del sys.modules["rich"]
else:
    sys.modules["rich"] = _rich
