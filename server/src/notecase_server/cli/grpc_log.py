"""Keeps gRPC's core from writing to standard error; it is to be imported before gRPC is.

The core writes a line for each connection that fails its handshake. Strangers make as many of these as they like, and
no reader of a log in JSON can read them. Errors of the core itself are still written.
"""

import os

os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
