"""Which completions of a file are worth keeping, and why the others are not."""
