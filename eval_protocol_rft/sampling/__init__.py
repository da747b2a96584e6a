"""From prompt ids to completions. Knows nothing of rows or of Eval Protocol."""
