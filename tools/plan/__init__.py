"""Searching for a plan, and looking at its front."""
