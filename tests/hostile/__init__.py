"""A completions server that misbehaves on purpose, and mutations of replies: for tests alone.

Invariant: what the server truly samples follows from (prompt, seed) alone, and its ledger says for
every request which fault met it and whether the true reply went out whole. So a test knows what a
client may accept without asking the client.
"""
