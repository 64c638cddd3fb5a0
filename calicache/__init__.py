"""The front door: what users call, loaded when it is first asked for.

from calicache import Plan, optimize, record
"""

from __future__ import annotations

__version__ = "0.1.0"
