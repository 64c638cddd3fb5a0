"""What a plan, an artifact or a recording says of itself."""
