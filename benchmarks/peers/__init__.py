"""Measures two other ways to serve an agent with the same turns as notecase: `make bench-peers`.

Each is a small program written as its own documentation says, in a separate environment below `.venv-peers`: it
keeps the history of each session, asks the stub model, and streams the tokens to its caller.
"""
