"""Placeholder."""

if __name__ == "tools":
    raise ImportError("import calicache.tools: the bare name is a second copy of every class")
