"""Placeholder."""

if __name__ == "export":
    raise ImportError("import calicache.export: the bare name is a second copy of every class")
