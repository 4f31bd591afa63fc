"""The pictures of a run."""

from pathlib import Path
from typing import Any


def plot_run(folder: Path) -> Path | None:
    """Draw loss, gradient norm, learning rate and expert load from metrics.jsonl; and, from
    precision.jsonl if it has telemetry, plots/flushed.png, what was flushed to zero.

    Returns:
        Path of plots/curves.png, or None if nothing was trained yet.
    """
    from train.heat_map import draw, flushed
    from train.metrics import MetricsFile

    records = [r for r in MetricsFile(folder / "metrics.jsonl").read() if r["loss"] is not None]
    if not records:
        return None
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, ((loss, norm), (rate, load)) = plt.subplots(2, 2, figsize=(11, 7))
    steps = [r["step"] for r in records]
    loss.plot(steps, [r["loss"] for r in records], label="next token", linewidth=1)
    for depth in range(len(records[0]["mtp_loss"])):
        values = [r["mtp_loss"][depth] for r in records]
        loss.plot(steps, values, label=f"MTP depth {depth + 1}", linewidth=1, alpha=0.7)
    checked = [r for r in records if r.get("validation_loss") is not None]
    if checked:
        x, y = [r["step"] for r in checked], [r["validation_loss"] for r in checked]
        loss.plot(x, y, "ko-", markersize=4, label="validation")
    loss.legend()
    _finish(loss, "loss (nats per token)")
    norm.plot(steps, [r["grad_norm"] for r in records], linewidth=1)
    norm.set_yscale("log")
    _finish(norm, "gradient norm")
    rate.plot(steps, [r["learning_rate"] for r in records])
    _finish(rate, "learning rate")
    for layer in range(len(records[0]["max_violation"])):
        values = [r["max_violation"][layer] for r in records]
        load.plot(steps, values, linewidth=1, alpha=0.7, label=f"MoE layer {layer + 1}")
    if records[0]["max_violation"]:
        load.legend()
    _finish(load, "MaxVio (busiest expert / mean - 1)")
    figure.suptitle(folder.name)
    figure.tight_layout()
    path = folder / "plots" / "curves.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    if shares := flushed(MetricsFile(folder / "precision.jsonl").read()):
        draw(folder.name, shares, path.with_name("flushed.png"))
    return path


def _finish(axes: Any, title: str) -> None:
    axes.set_title(title)
    axes.set_xlabel("step")
    axes.grid(alpha=0.3)
