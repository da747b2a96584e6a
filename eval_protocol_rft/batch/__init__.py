"""Rollouts in bulk: generate once, score many times, filter, and look at them."""
