"""Sets what gRPC's core reads from the environment; it is to be imported before gRPC is.

The core writes a line for each connection that fails its handshake, and for each call with a header that it cannot
parse. Untrusted clients can cause any number of these lines, and they are not JSON.

Its handlers for forks are turned off. uvloop forks to start the program of an MCP server, and in the new process these
handlers crash while the server has calls: a third of the programs died before they were executed.
"""

import os

os.environ.setdefault("GRPC_VERBOSITY", "NONE")
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
