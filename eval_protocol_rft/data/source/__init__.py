"""Data sets of prompts, whatever their format."""
