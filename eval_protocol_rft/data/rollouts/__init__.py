"""The rollout file: its columns, its rows, and how they lie in Parquet and JSON lines."""
