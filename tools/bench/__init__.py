"""A model in every layout beside its peers."""
