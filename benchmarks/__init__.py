"""What the server costs on the machine this runs on, against the targets it is held to: `make bench`.

The server is a process of its own on one CPU; the model that it asks and the load that it bears share another. What is
measured is the server's CPU time wherever that answers the question, because other work on a machine moves it least.
"""

import os

# Read by gRPC when it is imported: the load starts servers while it has connections, and none of them inherits one.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
