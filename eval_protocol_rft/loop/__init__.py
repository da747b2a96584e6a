"""Closing the loop: sample, score, step, publish, again."""
