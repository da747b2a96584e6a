"""Trainer jobs at work: the training wire, which is Tinker's.

`_training_api` is HTTP. `_training` takes calls in their order, and goes on with them after a
kill: `_operations` has them on disk. `_calls` says what each does to a `_model_in_training`,
`_wire_losses` reads its datums and has the losses, `_checkpoints` keeps what is saved.
"""
