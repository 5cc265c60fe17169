"""The notecase server: agents, sessions, state, messages and runs over gRPC."""

__version__ = "0.1.0"
