"""A data set in, a rollout file out, continued after any interruption."""
