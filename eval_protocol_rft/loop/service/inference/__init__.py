"""Inference: which weights answer which name (`_served`), chat (`_chat`), and new weights for a
deployment that runs (`_hot_load`). Completions are those of `eval_protocol_rft.local.server`.
"""
