"""Small matplotlib pieces that draw into given axes; nothing touches pyplot's global state, so all work headless."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxhpo import Comparison, TuneResult
from jaxhpo._tune import table

FEW = 8  # entries of a hyperparameter that are drawn as lines of their own


def figure(rows: int = 1, columns: int = 1, *, width: float = 11.0, height: float = 8.0) -> tuple[Any, np.ndarray]:
    """A figure that belongs to nobody else, with a grid of axes.

    Args:
      rows: number of rows of axes.
      columns: number of columns of axes.
      width: inches.
      height: inches.

    Returns:
      The matplotlib `Figure` and a (rows, columns) array of its axes.

    Raises:
      ImportError: without matplotlib.

    Example:
      >>> from jaxhpo import plot
      >>> figure, axes = plot.figure(1, 2)
      >>> axes.shape
      (1, 2)
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            f"`jaxhpo.plot` draws with matplotlib, which cannot be imported ({error}). "
            "Install it: pip install 'jaxhpo[demo]'"
        ) from error
    canvas = Figure(figsize=(width, height), layout="constrained")
    axes = canvas.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    return canvas, axes


def save(figure: Any, path: str | os.PathLike, *, dpi: int = 150) -> None:
    """Writes a figure to a file whose ending names the format.

    Args:
      figure: what `figure` returned.
      path: such as `"demo.png"` or `"demo.pdf"`.
      dpi: dots an inch, for formats made of pixels.

    Example:
      >>> from jaxhpo import plot
      >>> figure, axes = plot.figure()
      >>> plot.save(figure, "empty.png")  # doctest: +SKIP
    """
    figure.savefig(path, dpi=dpi)


def band(axis: Any, x, mean, sem, *, label: str, color: Any = None, **style: Any) -> None:
    """A line with a band of plus and minus one standard error; points that are not finite are left out.

    Args:
      axis: matplotlib axes.
      x: (n,) abscissae.
      mean: (n,) values.
      sem: (n,) standard errors.
      label: the legend's text.
      color: any matplotlib colour; None takes the next of the cycle.
      **style: further arguments of `axis.plot`.

    Example:
      >>> from jaxhpo import plot
      >>> figure, axes = plot.figure()
      >>> plot.band(axes[0, 0], [1, 2], [0.5, 0.4], [0.1, 0.1], label="random search")
    """
    x, mean, sem = (np.asarray(values, float) for values in (x, mean, sem))
    keep = np.isfinite(mean) & np.isfinite(sem)
    (line,) = axis.plot(x[keep], mean[keep], label=label, color=color, **style)
    axis.fill_between(
        x[keep],
        (mean - sem)[keep],
        (mean + sem)[keep],
        color=line.get_color(),
        alpha=0.18,
        linewidth=0,
        step="post" if "steps" in str(style.get("drawstyle", "")) else None,
    )


def image(axis: Any, values, *, label: str, mask=None, center: float | None = None, colormap: str = "RdBu_r") -> None:
    """A matrix as an image with a colour bar.

    Args:
      axis: matplotlib axes.
      values: (rows, columns) numbers.
      label: the colour bar's text.
      mask: (rows, columns) booleans, True where there is nothing to show; these are drawn grey.
      center: the value that gets the colour map's middle, for diverging maps.
      colormap: a matplotlib colour map's name.

    Example:
      >>> import numpy as np
      >>> from jaxhpo import plot
      >>> figure, axes = plot.figure()
      >>> plot.image(axes[0, 0], np.eye(8), label="penalty")
    """
    shown = np.ma.masked_invalid(np.asarray(values, float))
    if mask is not None:
        shown = np.ma.masked_where(np.asarray(mask) | np.ma.getmaskarray(shown), shown)
    limits = {}
    if center is not None and shown.count():
        reach = float(np.abs(shown - center).max()) or 1.0
        limits = {"vmin": center - reach, "vmax": center + reach}
    drawn = axis.imshow(shown, cmap=colormap, interpolation="nearest", **limits)
    axis.set_facecolor("0.85")
    axis.spines[:].set_visible(False)
    axis.set_xticks([])
    axis.set_yticks([])
    axis.figure.colorbar(drawn, ax=axis, label=label, shrink=0.9)


def bars(
    axis: Any,
    names: Sequence[str],
    series: dict[str, tuple[Any, Any]],
    *,
    colors: Sequence[Any] = ("#34495e", "#a9b8c9"),
    format: str = "{:.3f}",
) -> None:
    """Grouped bars with error bars and the numbers written beside them, one group of bars to each name.

    The axis starts just below the lowest bar, not at zero, so that differences can be seen: say so in its label.

    Args:
      axis: matplotlib axes.
      names: one a group, from top to bottom.
      series: label -> (means, standard errors), each one number a group.
      colors: one a label.
      format: how a number is written.

    Example:
      >>> from jaxhpo import plot
      >>> figure, axes = plot.figure()
      >>> plot.bars(axes[0, 0], ["grid", "random"], {"test": ([0.92, 0.93], [0.01, 0.01])})
    """
    height = 0.8 / len(series)
    positions = np.arange(len(names))
    lowest, highest = np.inf, -np.inf
    for row, (label, (means, errors)) in enumerate(series.items()):
        means, errors = np.asarray(means, float), np.nan_to_num(np.asarray(errors, float))
        at = positions + (row - (len(series) - 1) / 2) * height
        whisker = {"lw": 1, "capsize": 2, "ecolor": "0.1"}
        color = colors[row % len(colors)]
        axis.barh(at, means, height * 0.92, xerr=errors, label=label, color=color, error_kw=whisker)
        lowest, highest = min(lowest, np.min(means - errors)), max(highest, np.max(means + errors))
        for y, mean, error in zip(at, means, errors, strict=True):
            offset = {"xytext": (4, 0), "textcoords": "offset points", "va": "center", "fontsize": 8}
            axis.annotate(format.format(mean), (mean + error, y), **offset)
    span = max(highest - lowest, 1e-3)
    axis.set_xlim(lowest - 0.25 * span, highest + 0.25 * span)
    axis.set_yticks(positions, names)
    axis.invert_yaxis()


def plain_log_ticks(axis: Any) -> None:
    """Labels a logarithmic axis with plain numbers (0.05, 0.1, 0.2) at 1, 2 and 5 times each power of ten.

    Args:
      axis: `axes.xaxis` or `axes.yaxis`.

    Example:
      >>> from jaxhpo import plot
      >>> figure, axes = plot.figure()
      >>> axes[0, 0].set_yscale("log")
      >>> plot.plain_log_ticks(axes[0, 0].yaxis)
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis.set_major_locator(LogLocator(10, subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def comparison(comparison: Comparison, path: str | os.PathLike | None = None) -> Any:
    """Error against time of every method in a `Comparison`; the marker's area grows with the logarithm of memory.

    Filled markers are methods that can be trusted on this problem, the recommended one in blue; hollow ones are not.
    Above the dotted line a hypergradient is not accurate. Methods with nothing to draw are listed all the same.

    Args:
      comparison: from `jaxhpo.compare`.
      path: where to write the picture, or None.

    Returns:
      The matplotlib `Figure`.

    Raises:
      ImportError: without matplotlib.

    Example:
      >>> from jaxhpo import plot
      >>> plot.comparison(jaxhpo.compare(make_outer_loss, hparams), "comparison.png")  # doctest: +SKIP
    """
    canvas, axes = figure(width=10.0, height=5.5)
    axis = axes[0, 0]
    errors = [row.relative_error for row in comparison.rows if row.relative_error]
    floor = min([1.0, *errors]) / 10  # where an error of zero is drawn: the reference itself
    axis.set(xscale="log", yscale="log", ylabel="relative error of the hypergradient")
    axis.set_xlabel("time of one hypergradient, in inner steps")
    best = [row.accurate for row in comparison.rows if row.name == comparison.recommended]
    told = "nearest, but not accurate" if best == [False] else "recommended here"
    axis.set_title(f"{told}: {comparison.recommended or 'none of these'}", fontsize=11)
    axis.set_ylim(floor / 5, 10 * max([1.0, *errors]))
    axis.axhline(1e-2, color="0.6", linestyle=":", zorder=0)
    for number, row in enumerate(comparison.rows, 1):
        color = "tab:blue" if row.name == comparison.recommended else "0.4"
        style = {"color": color if row.accurate else "white", "edgecolors": color, "linewidths": 1.4}
        area = 120 * (1 + np.log10(1 + (row.copies or 0.0)))
        at = (row.gradients, max(row.relative_error, floor)) if row.relative_error is not None else (np.nan, np.nan)
        axis.scatter(*at, s=area, label=f"{number}  {_caption(row)}", alpha=0.9, zorder=3, **style)
        if row.relative_error is not None:
            text = {"color": "white" if row.accurate else "0.2", "ha": "center", "va": "center", "zorder": 4}
            axis.annotate(str(number), at, fontsize=8, **text)
    plain_log_ticks(axis.xaxis)
    axis.margins(x=0.1)
    legend = axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5), labelspacing=0.9)
    for handle in legend.legend_handles:
        handle.set_sizes([60.0])
    if path is not None:
        save(canvas, path)
    return canvas


def _caption(row) -> str:
    if row.error is not None:
        return f"{row.name}: raised an error"
    if not row.finite:
        return f"{row.name}: not finite"
    memory = "" if row.copies is None else f", {row.copies:.3g} copies"
    blind = f",\nblind to {', '.join(row.blind)}" if row.blind else ""
    return f"{row.name}{' = the reference' if row.relative_error == 0 else ''}{memory}{blind}"


def run(source: TuneResult | str | os.PathLike, path: str | os.PathLike | None = None) -> Any:
    """How a run of `tune` went: convergence, the hypergradient's health, the paths of the hyperparameters.

    Of a population, it shows the best member.
    A hyperparameter of up to eight entries has a line for each, a larger one its median, quartiles and extremes. Of
    each vector with 9 to 1024 entries (a schedule) the first, the middle and the last step are drawn over the index, of
    each matrix the last step as a heat map; at most six of them.

    Args:
      source: what `tune` returned, or its `run_dir`, also while the run is going on.
      path: where to write the picture, or None.

    Returns:
      The matplotlib `Figure`.

    Raises:
      ImportError: without matplotlib.
      JaxhpoError: a folder without a history.

    Example:
      >>> from jaxhpo import plot
      >>> plot.run("runs/1", "run.png")  # doctest: +SKIP
    """
    columns, which = table.columns_of_best(source)
    hparams = {name: values for name, values in columns.items() if name.startswith("hparams")}
    large = [name for name, x in hparams.items() if x.ndim > 1 and x[0].size > FEW][:6]
    panels = 3 + len(large)
    canvas, axes = figure(-(-panels // 3), 3, width=14.0, height=4.0 * -(-panels // 3))
    free = iter(axes.flat)
    _convergence(next(free), columns)
    _health(next(free), columns)
    _paths(next(free), hparams)
    for name in large:
        _last_values(next(free), name, hparams[name])
    for axis in free:
        axis.set_visible(False)
    canvas.suptitle(which)
    if path is not None:
        save(canvas, path)
    return canvas


def _convergence(axis, columns) -> None:
    value, score = columns["value"], columns["score"]
    axis.plot(value, lw=1, color="tab:blue", label="outer loss")
    if not np.array_equal(value, score, equal_nan=True):
        axis.plot(score, lw=1, color="tab:orange", label="monitored")
    best = np.fmin.accumulate(score)
    axis.plot(best, lw=1, color="0.3", ls="--", label="best so far")
    skipped = np.flatnonzero(columns["remedies['skipped_steps']"])
    if skipped.size:
        axis.plot(skipped, best[skipped], "x", color="tab:red", label="skipped")
    if np.nanmin(value) > 0 and np.nanmax(value) > 20 * np.nanmin(value):
        axis.set_yscale("log")
    axis.set(xlabel="outer step", title="Convergence")
    axis.legend(frameon=False)


def _health(axis, columns) -> None:
    axis.semilogy(columns["hypergradient_norm"], lw=1, color="tab:blue")
    counts = {name[len("remedies['") : -2]: x for name, x in columns.items() if name.startswith("remedies")}
    for i, (name, x) in enumerate((n, x) for n, x in counts.items() if x.any()):
        at = np.flatnonzero(x)
        label = f"{name.replace('_', ' ')}: {int(x.sum())}"
        axis.plot(at, np.full(at.size, 0.03 + 0.05 * i), "|", ms=8, color=f"C{i + 1}", label=label,
                  transform=axis.get_xaxis_transform())  # fmt: skip
        axis.legend(frameon=False)
    axis.set(xlabel="outer step", title="Norm of the hypergradient")


def _paths(axis, hparams) -> None:
    for i, (name, values) in enumerate(hparams.items()):
        short, flat = name.removeprefix("hparams") or "hparams", values.reshape(len(values), -1)
        if flat.shape[1] <= FEW:
            axis.plot(flat[:, 0], lw=1, color=f"C{i}", label=short)
            axis.plot(flat[:, 1:], lw=1, color=f"C{i}")
            continue
        low, first, median, third, high = np.quantile(flat, [0, 0.25, 0.5, 0.75, 1], axis=1)
        axis.plot(median, lw=1, color=f"C{i}", label=f"{short}, {flat.shape[1]} entries")
        for bounds, alpha in (((first, third), 0.3), ((low, high), 0.12)):
            axis.fill_between(np.arange(len(flat)), *bounds, color=f"C{i}", alpha=alpha, linewidth=0)
    everything = np.concatenate([x.ravel() for x in hparams.values()])
    if everything.min() > 0 and everything.max() > 20 * everything.min():
        axis.set_yscale("log")
    axis.set(xlabel="outer step", title="Hyperparameters")
    axis.legend(frameon=False, fontsize=8)


def _last_values(axis, name, values) -> None:
    if values.ndim == 3:
        image(axis, values[-1], label=name, colormap="viridis")
        axis.set_title(f"{name} at the last step")
        return
    for step in sorted({0, len(values) // 2, len(values) - 1}):
        axis.plot(values[step].ravel(), lw=1, label=f"step {step}")
    axis.set(xlabel="index", title=name)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.legend(frameon=False)
