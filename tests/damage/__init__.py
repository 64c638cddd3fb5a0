"""Files that were damaged or crafted: refused in words, or as good as they were."""
