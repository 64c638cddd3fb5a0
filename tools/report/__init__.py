"""Everything about an artifact or a plan as one HTML page."""
