"""Repairs a class with low recall, selects the repair on validation data, and reports whether it succeeded."""
