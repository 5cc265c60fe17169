"""Two other ways to serve an agent, measured with the turns that notecase is measured with: `make bench-peers`.

Each is a small program written as its own documentation says, in an environment of its own below `.venv-peers`: it
keeps the history of each session, asks the stub model, and streams the tokens to its caller.
"""
