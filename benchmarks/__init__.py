"""Measures the cost of the server on this machine, and compares it with the targets: `make bench`.

The server is a separate process on one CPU; the model and the load share another. If possible, the figure is the
server's CPU time, because other work on the machine affects it least.
"""

import os

# Read by gRPC when it is imported: the load starts servers while it has connections, and none of them inherits one.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
