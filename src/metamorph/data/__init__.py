"""Data: raw rows become examples, examples become batches."""
