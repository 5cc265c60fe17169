"""A program that speaks MCP on its pipes by hand, and says more than an answer can have.

`python -m tests.support.mcp_endless FILE` adds its process id to the file, a line each. Its one tool takes `how`:
"long" and "many" are whole lines, "endless" has no end.
"""

import json
import os
import sys
from typing import Any

from notecase_server.tools.mcp_answers import MAX_ANSWER

TOOL = {"name": "t", "inputSchema": {"type": "object"}}
ABOUT = {"protocolVersion": "2025-06-18", "capabilities": {"tools": {}}, "serverInfo": {"name": "s", "version": "1"}}


def answer(asked: dict[str, Any]) -> dict[str, Any]:
    match asked["method"]:
        case "initialize":
            return {"result": ABOUT}
        case "tools/list":
            return {"result": {"tools": [TOOL]}}
        case "tools/call":
            return {"result": {"content": content(asked["params"]["arguments"]["how"])}}
    return {"error": {"code": -32601, "message": "no"}}


def content(how: str) -> list[dict[str, str]]:
    while how == "endless":
        sys.stdout.write("x" * (1 << 16))
    block = {"type": "text", "text": "x" * MAX_ANSWER if how == "long" else "x"}
    return [block] * (100_000 if how == "many" else 1)


def main() -> None:
    with open(sys.argv[1], "a") as pids:
        pids.write(f"{os.getpid()}\n")
    for line in sys.stdin:
        asked = json.loads(line)
        if "id" in asked:
            sys.stdout.write(json.dumps({"jsonrpc": "2.0", "id": asked["id"], **answer(asked)}) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
