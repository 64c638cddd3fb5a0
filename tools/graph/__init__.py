"""A rewritten graph beside the plain one, as text or as a drawing."""
