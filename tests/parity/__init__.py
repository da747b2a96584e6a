"""What an evaluator sees here, beside what it sees behind a chat server."""
