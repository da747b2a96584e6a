"""Fireworks on loopback, small and real: it trains a tiny model and serves what it trained.

`account` holds the resources of the control plane, `grpo` trains from a data set of text rows,
`policy` is one model in training behind the `training_api`, `weights` swaps what is served, and
`routes` and `server` put all of it behind HTTP. What it knows of the service is what the client
libraries send and need; it is not evidence of what the service does.
"""
