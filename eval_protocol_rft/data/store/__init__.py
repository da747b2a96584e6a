"""Rows on their way to a file, safe at any moment."""
