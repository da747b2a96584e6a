"""Inference: what a name leads to (`_targets`) and samples (`_served`), chat (`_chat`), and new
weights for a deployment that runs (`_hot_load`). Completions are those of
`eval_protocol_rft.local.server`.
"""
