"""Repairs a class that a model is poor at, chooses the repair on validation data, and says whether it is one."""
