"""What every tool stands on: text, charts, progress, loading what a command is pointed at."""
