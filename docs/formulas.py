"""MkDocs hook: fences of the language `math` become MathML, which browsers draw without a script.

GitHub draws the same fences by itself.
"""

from __future__ import annotations

from typing import Any

from latex2mathml.converter import convert


def on_config(config: Any) -> Any:
    """Teach the fences extension the language `math`."""
    fences = config.mdx_configs.setdefault("pymdownx.superfences", {})
    fences["custom_fences"] = [{"name": "math", "class": "formula", "format": _formula}]
    return config


def _formula(source: str, language: str, css_class: str, *_: Any, **__: Any) -> str:  # noqa: ARG001
    return f'<div class="{css_class}">{convert(source, display="block")}</div>'
