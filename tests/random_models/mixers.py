"""What random blocks do inside: perceptrons and every way to write attention, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, HEADS, TEXT = 8, 2, 3
HEAD = WIDTH // HEADS


@dataclass(frozen=True)
class Context:
    """What a block may look at beside its tokens.

    Attributes:
        text: (B, TEXT, WIDTH), of the prompt.
        mask: bool (B, N), which tokens count.
        rope: `none`, `real` or `complex`; how queries and keys are turned.
    """

    text: Tensor
    mask: Tensor
    rope: str


def _wide(value: Tensor) -> Tensor:
    """A value of a dtype that complex numbers have."""
    return value if value.dtype is torch.float64 else value.float()


def _turned(value: Tensor, rope: str) -> Tensor:
    """Queries or keys (B, H, N, d) turned by their places."""
    if rope == "none":
        return value
    tokens, half = value.shape[2], value.shape[3] // 2
    angles = torch.arange(tokens)[:, None] * 0.5 ** torch.arange(half)
    if rope == "complex":
        pairs = torch.view_as_complex(_wide(value).unflatten(3, (half, 2)).contiguous())
        angles = angles.to(pairs.real.dtype)
        turned = torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles))
        return turned.flatten(3).to(value.dtype)
    cos, sin = angles.cos().to(value.dtype), angles.sin().to(value.dtype)
    first, second = value.chunk(2, dim=3)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=3)


class Perceptron(nn.Module):
    """fc2(act(fc1(x))), with operations in place where asked for."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        gated = kind in ("geglu", "split")
        self.fc1 = nn.Linear(WIDTH, 4 * WIDTH if gated else 2 * WIDTH, bias=kind != "geglu")
        self.fc2 = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor, _context: Context) -> Tensor:
        h = self.fc1(x)
        if self.kind in ("geglu", "split"):
            value, gate = h.chunk(2, dim=-1)
            act = F.gelu(gate, approximate="tanh") if self.kind == "geglu" else F.silu(gate)
            return self.fc2(value * act)
        if self.kind == "in_place":
            h = F.relu(h, inplace=True).mul_(0.5).add_(0.1)
            h[..., 0] = h[..., 1] * 2
            return self.fc2(h)
        return self.fc2(h.relu().square() if self.kind == "squared" else torch.tanh(h))


class Attention(nn.Module):
    """Attention of the tokens to themselves or to the text."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        keys = HEAD if kind == "grouped" else WIDTH
        if kind == "fused":
            self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        else:
            self.q = nn.Linear(WIDTH, WIDTH)
            self.k, self.v = nn.Linear(WIDTH, keys), nn.Linear(WIDTH, keys, bias=False)
        self.norm = nn.RMSNorm(HEAD) if kind == "normed" else nn.Identity()
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        source = context.text if self.kind == "cross" else x
        if self.kind == "fused":
            parts = list(self.qkv(x).chunk(3, dim=-1))
        else:
            parts = [self.q(x), self.k(source), self.v(source)]
        q, k, v = (part.unflatten(-1, (-1, HEAD)).transpose(1, 2) for part in parts)
        q, k = self.norm(q), self.norm(k)
        if self.kind != "cross":
            q, k = _turned(q, context.rope), _turned(k, context.rope)
        return self.out(self._mixed(q, k, v, context).transpose(1, 2).flatten(2))

    def _mixed(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        if self.kind == "grouped":
            k, v = (part.repeat_interleave(HEADS, dim=1) for part in (k, v))
        if self.kind == "written_out":
            scores = (q @ k.transpose(-1, -2)) * HEAD**-0.5
            return scores.softmax(dim=-1) @ v
        if self.kind == "masked":
            return F.scaled_dot_product_attention(
                q, k, v, attn_mask=context.mask[:, None, None].expand(-1, -1, q.shape[2], -1)
            )
        if self.kind == "linear":
            q, k = q.softmax(dim=-1), k.softmax(dim=-2)
            return q @ (k.transpose(-1, -2) @ v)
        return F.scaled_dot_product_attention(q, k, v, is_causal=self.kind == "causal")


class TorchAttention(nn.Module):
    """torch's own."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

    def forward(self, x: Tensor, _context: Context) -> Tensor:
        mixed: Tensor = self.attn(x, x, x, need_weights=False)[0]
        return mixed


class Scatter(nn.Module):
    """A perceptron for some tokens, which are picked out and put back."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.inside = kind, Perceptron("tanh")

    def forward(self, x: Tensor, context: Context) -> Tensor:
        count = x.shape[1] // 2
        places = torch.arange(count) * 2
        if self.kind == "index_put":
            result = torch.zeros_like(x)
            result[:, places] = self.inside(x[:, places], context)
            return result
        spread = places[None, :, None].expand(x.shape[0], -1, x.shape[2])
        chosen = self.inside(x.gather(1, spread), context)
        if self.kind == "index_add":
            return torch.zeros_like(x).index_add(1, places // 2, chosen)
        return torch.zeros_like(x).scatter_add(1, spread, chosen)


class Convolution(nn.Module):
    """A depthwise convolution over the tokens, and a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, _context: Context) -> Tensor:
        return self.out(F.silu(self.conv(x.transpose(1, 2)).transpose(1, 2)))


class Fourier(nn.Module):
    """Tokens mixed through complex numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.phase = nn.Parameter(torch.randn(WIDTH // 2))

    def forward(self, x: Tensor, _context: Context) -> Tensor:
        pairs = torch.view_as_complex(_wide(self.first(x)).unflatten(-1, (-1, 2)).contiguous())
        phase = _wide(self.phase)
        turned = pairs * torch.polar(torch.ones_like(phase), phase)
        return self.out(torch.view_as_real(turned).flatten(-2).to(x.dtype))


PERCEPTRONS = ("tanh", "squared", "geglu", "split", "in_place")
ATTENTIONS = (
    *("fused", "separate", "grouped", "normed", "cross", "written_out", "masked", "causal"),
    "linear",
)
SCATTERS = ("index_put", "index_add", "scatter_add")
MIXERS: dict[str, Callable[[], nn.Module]] = {
    **{kind: lambda kind=kind: Perceptron(kind) for kind in PERCEPTRONS},
    **{kind: lambda kind=kind: Attention(kind) for kind in ATTENTIONS},
    **{kind: lambda kind=kind: Scatter(kind) for kind in SCATTERS},
    "torch": TorchAttention,
    "convolution": Convolution,
    "fourier": Fourier,
}
WITHOUT_TOKENS = PERCEPTRONS
