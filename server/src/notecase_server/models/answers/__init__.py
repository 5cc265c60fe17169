"""Reads answers in the format of Chat Completions: framing, documents, calls, usage and errors, with tables of their
meanings."""
