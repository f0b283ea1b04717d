"""Training: how weights change."""
