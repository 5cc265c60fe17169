"""A program that speaks MCP on its pipes by hand, and answers as careless servers do.

`python -m tests.support.mcp_careless FILE` adds its process id to the file, a line each. Its one tool takes `line`,
which is its answer, with ID in the place of the request's id; bytes above 127 are written as Latin-1. With `silent` it
answers nothing from then on, and adds the line "silent" to the file.
"""

import json
import os
import sys

ABOUT = {"protocolVersion": "2025-06-18", "capabilities": {"tools": {}}, "serverInfo": {"name": "s", "version": "1"}}
TOOLS = {"tools": [{"name": "t", "inputSchema": {"type": "object"}}]}


def note(line: str) -> None:
    with open(sys.argv[1], "a") as file:
        file.write(f"{line}\n")


def main() -> None:
    note(str(os.getpid()))
    silent = False
    for line in sys.stdin:
        asked = json.loads(line)
        if not silent and "silent" in asked.get("params", {}).get("arguments", {}):
            silent = True
            note("silent")
        if silent or "id" not in asked:
            continue
        result = {"initialize": ABOUT, "tools/list": TOOLS}.get(asked["method"])
        said = json.dumps({"jsonrpc": "2.0", "id": asked["id"], "result": result})
        if result is None:
            said = asked["params"]["arguments"]["line"].replace("ID", json.dumps(asked["id"]))
        sys.stdout.buffer.write(f"{said}\n".encode("latin-1"))
        sys.stdout.flush()


if __name__ == "__main__":
    main()
