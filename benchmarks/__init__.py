"""Scripts that time the package against a named peer in one run, and print a ratio."""
