"""A user's evaluator over stored completions."""
