"""From a rollout file to training datums."""
