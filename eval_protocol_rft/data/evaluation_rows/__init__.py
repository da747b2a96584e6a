"""Rows of the file as rows of Eval Protocol, and back."""
