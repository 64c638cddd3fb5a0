"""`python -m calicache`, which torchrun starts: the `calicache` command."""

from calicache.tools.cli import app

if __name__ == "__main__":
    app(prog_name="calicache")
