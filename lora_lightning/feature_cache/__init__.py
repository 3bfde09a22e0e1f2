"""Computes what is frozen once a sample."""
