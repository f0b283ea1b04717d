"""The model: what is saved with the weights."""
