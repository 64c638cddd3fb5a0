"""What planning, searching and running take at any size, from shapes alone."""
