"""Rollout files into what others read, and back.

Invariant: nothing is lost in silence. What the target has no place for is in the summary's notes,
or the conversion is refused; text is never made into tokens.
"""
