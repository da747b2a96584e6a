"""The control plane: accounts, models, shapes, jobs, checkpoints, deployments, data sets.

`_control` is the table of routes, with HTTP in front. A file a group of resources; `_resources` and
`_fields` are what they have in common. `_steps` carries out reinforcement fine-tuning steps, which
train from rows of text (`_step_rows`).
"""
