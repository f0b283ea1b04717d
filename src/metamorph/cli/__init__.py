"""The `metamorph` command, one file per noun."""
