"""Files and folders: written as a whole, checked as they are read."""
