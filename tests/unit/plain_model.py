"""Nemotron-H in plain float64 arithmetic, from the tensors of a Hugging Face folder: an oracle that
shares nothing with Megatron, transformers or the conversion.

Written from the published description: Mamba-2 as its recurrence, one token after the other;
attention without positions; the router of sigmoid scores; multi-token prediction with the
embedding before the hidden state (arXiv 2512.20848, 2512.20856; DeepSeek-V3's MTP, 2412.19437).

Shapes: s tokens of one text, d hidden_size.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.torch import load_file

type Array = NDArray[np.float64]
type Weights = Mapping[str, Array]


def run(
    folder: Path, tokens: list[int], largest: dict[str, float] | None = None
) -> tuple[Array, list[Array]]:
    """Logits [s, V] of the next token, and for each MTP depth k those of the token k + 1 places
    on, [s - k, V]. `largest` is given the largest absolute input of every projection."""
    config = json.loads((folder / "config.json").read_text())
    w = _weights(folder)
    if largest is not None:
        w = {
            k: _Watched.of(v, k, largest) if k.endswith("proj.weight") else v for k, v in w.items()
        }
    embedded = w["backbone.embeddings.weight"][tokens]
    x = embedded
    for i, symbol in enumerate(config["hybrid_override_pattern"]):
        x = _layer(symbol, x, _under(w, f"backbone.layers.{i}."), config)
    x = _norm(x, w["backbone.norm_f.weight"], config)
    main, drafts = x @ w["lm_head.weight"].T, []
    inner = config.get("mtp_hybrid_override_pattern", "")
    for depth in range(config.get("mtp_num_layers", 0)):
        block = 0 if config["mtp_use_repeated_layer"] else depth * len(inner)
        first, last = (_under(w, f"mtp.layers.{i}.") for i in (block, block + len(inner) - 1))
        ahead = _norm(embedded[depth + 1 :], first["enorm.weight"], config)
        behind = _norm(x[:-1], first["hnorm.weight"], config)
        x = np.concatenate([ahead, behind], axis=1) @ first["eh_proj.weight"].T
        for j, symbol in enumerate(inner):
            x = _layer(symbol, x, _under(w, f"mtp.layers.{block + j}."), config)
        x = _norm(x, last["final_layernorm.weight"], config)
        drafts.append(x @ w["lm_head.weight"].T)
    return main, drafts


class _Watched(np.ndarray[Any, np.dtype[np.float64]]):
    """A weight that notes what it is multiplied with."""

    @classmethod
    def of(cls, weight: Array, name: str, largest: dict[str, float]) -> "_Watched":
        made = weight.view(cls)
        made.note = (name.removesuffix(".weight"), largest)
        return made

    def __array_finalize__(self, source: Any) -> None:
        self.note: tuple[str, dict[str, float]] = getattr(source, "note", ("", {}))

    def __rmatmul__(self, x: Array) -> Array:  # type: ignore[override]
        name, largest = self.note
        largest[name] = max(largest.get(name, 0), float(np.abs(x).max()))
        return x @ np.asarray(self)


def _weights(folder: Path) -> Weights:
    files = sorted(folder.glob("*.safetensors"))
    return {k: v.double().numpy() for file in files for k, v in load_file(file).items()}


def _under(w: Weights, prefix: str) -> Weights:
    return {k.removeprefix(prefix): v for k, v in w.items() if k.startswith(prefix)}


def _layer(symbol: str, x: Array, w: Weights, config: Any) -> Array:
    mixer = {"M": _mamba, "*": _attention, "E": _experts, "-": _mlp}[symbol]
    return x + mixer(_norm(x, w["norm.weight"], config), _under(w, "mixer."), config)


def _norm(x: Array, weight: Array, config: Any) -> Array:
    mean = (x * x).mean(-1, keepdims=True)
    return x / np.sqrt(mean + config["layer_norm_epsilon"]) * weight


def _silu(x: Array) -> Array:
    return x / (1 + np.exp(-x))


def _mlp(x: Array, w: Weights, config: Any) -> Array:
    return np.maximum(x @ w["up_proj.weight"].T, 0) ** 2 @ w["down_proj.weight"].T


def _attention(x: Array, w: Weights, config: Any) -> Array:
    width = config["head_dim"]
    q, k, v = ((x @ w[f"{n}_proj.weight"].T).reshape(len(x), -1, width) for n in "qkv")
    share = q.shape[1] // k.shape[1]
    future = np.triu(np.full((len(x), len(x)), -np.inf), 1)
    heads = []
    for head in range(q.shape[1]):
        scores = q[:, head] @ k[:, head // share].T / np.sqrt(width) + future
        chances = np.exp(scores - scores.max(-1, keepdims=True))
        heads.append(chances / chances.sum(-1, keepdims=True) @ v[:, head // share])
    return np.concatenate(heads, axis=1) @ w["o_proj.weight"].T


def _experts(x: Array, w: Weights, config: Any) -> Array:
    scores = 1 / (1 + np.exp(-x @ w["gate.weight"].T))
    biased = scores + w["gate.e_score_correction_bias"]
    if config["n_group"] > 1:  # experts of the groups whose best two have most together
        grouped = biased.reshape(len(x), config["n_group"], -1)
        strength = np.sort(grouped, axis=-1)[..., -2:].sum(-1)
        least = np.sort(strength, axis=-1)[:, -config["topk_group"]]
        grouped[strength < least[:, None]] = -np.inf
    latent = x @ w["fc1_latent_proj.weight"].T if "fc1_latent_proj.weight" in w else x
    mixed = np.zeros_like(latent)
    for token, row in enumerate(biased):
        chosen = np.argsort(row)[-config["num_experts_per_tok"] :]
        shares = scores[token, chosen] / scores[token, chosen].sum()
        for expert, share in zip(chosen, shares * config["routed_scaling_factor"], strict=True):
            mixed[token] += share * _mlp(latent[token], _under(w, f"experts.{expert}."), config)
    if "fc2_latent_proj.weight" in w:
        mixed = mixed @ w["fc2_latent_proj.weight"].T
    return mixed + _mlp(x, _under(w, "shared_experts."), config)


def _mamba(x: Array, w: Weights, config: Any) -> Array:
    heads, width = config["mamba_num_heads"], config["mamba_head_dim"]
    groups, states = config["n_groups"], config["ssm_state_size"]
    inner, kernel = heads * width, w["conv1d.weight"][:, 0].T
    z, convolved, dt = np.split(x @ w["in_proj.weight"].T, [inner, -heads], axis=1)
    padded = np.concatenate([np.zeros((len(kernel) - 1, convolved.shape[1])), convolved])
    windows = [(padded[t : t + len(kernel)] * kernel).sum(0) for t in range(len(x))]
    convolved = _silu(np.array(windows) + w["conv1d.bias"])
    u, b, c = np.split(convolved, [inner, inner + groups * states], axis=1)
    u = u.reshape(-1, heads, width)
    b, c = (np.repeat(y.reshape(-1, groups, states), heads // groups, axis=1) for y in (b, c))
    dt = np.log1p(np.exp(dt + w["dt_bias"]))
    decay = np.exp(-np.exp(w["A_log"]) * dt)
    state, out = np.zeros((heads, width, states)), []
    for t in range(len(x)):
        step = dt[t][:, None, None] * u[t][:, :, None] * b[t][:, None, :]
        state = decay[t][:, None, None] * state + step
        out.append((state * c[t][:, None, :]).sum(-1) + w["D"][:, None] * u[t])
    gated = (np.array(out).reshape(-1, inner) * _silu(z)).reshape(len(x), groups, -1)
    normed = _norm(gated, np.ones(()), config).reshape(-1, inner) * w["norm.weight"]
    return normed @ w["out_proj.weight"].T
