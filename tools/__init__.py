"""Command-line tools: thin commands over the library."""

if __name__ == "tools":
    raise ImportError("import calicache.tools: the bare name makes a second copy of every class")
