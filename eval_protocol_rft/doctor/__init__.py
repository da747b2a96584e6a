"""`ep-rft doctor`: whether a setup (tokenizer, template, server, weights) is fit to train with.

Invariant: a check is pure: numbers in, `Finding` out, with what was measured and the bar that it
was held to. `probe`, `ask_echo` and `weights` alone do I/O; `run` puts them in order. A check that
could not be made says so; it never passes.
"""
