"""What a rollout file holds, in numbers."""
