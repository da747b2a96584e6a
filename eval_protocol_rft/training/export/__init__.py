"""Training data in each consumer's own types, one small module per consumer.

    from eval_protocol_rft.training.export import fireworks

    client.forward_backward(fireworks.to_datums(batch), batch.loss_fn, dict(batch.loss_fn_config))

Invariant: what a consumer cannot be given exactly is an `ExportError`, never an approximation, and
an unscored completion never becomes a reward of 0. A consumer's package is imported when it is
needed; where it is missing, `MissingPackageError` names what to install.
"""
