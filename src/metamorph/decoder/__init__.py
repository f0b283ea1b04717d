"""The decoder: visual tokens become pixels."""
