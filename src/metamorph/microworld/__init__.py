"""A tiny world whose truth is known, with pretrained parts of its own."""
