"""What reads an answer of a provider that speaks Chat Completions: its framing, its documents, its calls, its usage and
its errors, and the tables of facts that say what they mean."""
