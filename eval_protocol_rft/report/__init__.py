"""What rollouts look like to a person: terminal tables."""
