"""A fuzz of every method of the server, from the descriptors: `make fuzz`, and for some seconds tests/test_fuzz.py.

`corpus` has requests that a client may well send, `making` makes others of them, and anything of the descriptors alone;
`judge` says what no answer may be; `play` sends them, several callers at once, and looks at what is left behind.
"""
