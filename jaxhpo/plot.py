"""Plots of comparisons and runs, and the matplotlib helpers they share; pyplot's global state is never touched."""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxhpo import Comparison, TuneResult
from jaxhpo._core.extra import needs_extra
from jaxhpo._tune import table

FEW = 8  # a hyperparameter with at most as many entries has a line for each


def figure(rows: int = 1, columns: int = 1, *, width: float = 11.0, height: float = 8.0) -> tuple[Any, np.ndarray]:
    """Makes a figure of its own, outside pyplot, with a grid of axes.

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
    with needs_extra("`jaxhpo.plot` draws with matplotlib", "demo"):
        from matplotlib.figure import Figure
    canvas = Figure(figsize=(width, height), layout="constrained")
    axes = canvas.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    return canvas, axes


def save(figure: Any, path: str | os.PathLike, *, dpi: int = 150) -> None:
    """Writes a figure to a file, in the format of its extension.

    Args:
      figure: what `figure` returned.
      path: such as `"demo.png"` or `"demo.pdf"`.
      dpi: dots per inch, for raster formats.

    Example:
      >>> from jaxhpo import plot
      >>> figure, axes = plot.figure()
      >>> plot.save(figure, "empty.png")  # doctest: +SKIP
    """
    figure.savefig(path, dpi=dpi)


def band(axis: Any, x, mean, sem, *, label: str, color: Any = None, **style: Any) -> None:
    """Draws a line with a band of plus and minus one standard error; points that are not finite are omitted.

    Args:
      axis: matplotlib axes.
      x: (n,) abscissae.
      mean: (n,) values.
      sem: (n,) standard errors.
      label: the legend's text.
      color: any matplotlib colour; None takes the next of the cycle.
      **style: more arguments of `axis.plot`.

    Example:
      >>> from jaxhpo import plot
      >>> figure, axes = plot.figure()
      >>> plot.band(axes[0, 0], [1, 2], [0.5, 0.4], [0.1, 0.1], label="random search")
    """
    x, mean, sem = (np.asarray(values, float) for values in (x, mean, sem))
    keep = np.isfinite(mean) & np.isfinite(sem)
    (line,) = axis.plot(x[keep], mean[keep], label=label, color=color, **style)
    low, high, step = mean - sem, mean + sem, "post" if "steps" in str(style.get("drawstyle", "")) else None
    axis.fill_between(x[keep], low[keep], high[keep], color=line.get_color(), alpha=0.18, linewidth=0, step=step)


def image(axis: Any, values, *, label: str, mask=None, center: float | None = None, colormap: str = "RdBu_r") -> None:
    """Draws a matrix as an image with a colour bar.

    Args:
      axis: matplotlib axes.
      values: (rows, columns) numbers.
      label: the colour bar's text.
      mask: (rows, columns) booleans, True where there is nothing to show; these are drawn grey.
      center: the value at the colour map's middle, for diverging maps.
      colormap: a matplotlib colour map's name.

    Example:
      >>> import numpy as np
      >>> from jaxhpo import plot
      >>> figure, axes = plot.figure()
      >>> plot.image(axes[0, 0], np.eye(8), label="penalty")
    """
    shown = np.ma.masked_invalid(np.asarray(values, float))
    if mask is not None:
        shown[np.asarray(mask)] = np.ma.masked
    limits = {}
    if center is not None and shown.count():
        reach = float(np.abs(shown - center).max()) or 1.0
        limits = {"vmin": center - reach, "vmax": center + reach}
    drawn = axis.imshow(shown, cmap=colormap, interpolation="nearest", **limits)
    axis.set_facecolor("0.85")
    axis.spines[:].set_visible(False)
    axis.set(xticks=[], yticks=[])
    axis.figure.colorbar(drawn, ax=axis, label=label, shrink=0.9)


def bars(
    axis: Any, names: Sequence[str], series: dict, *, colors: Sequence = ("#34495e", "#a9b8c9"), format: str = "{:.3f}"
) -> None:
    """Draws grouped bars with error bars and their numbers, one group of bars per name.

    The axis starts just below the lowest bar, not at zero, to show the differences: say so in its label.

    Args:
      axis: matplotlib axes.
      names: one per group, from top to bottom.
      series: label -> (means, standard errors), each with one number per group.
      colors: one per label.
      format: the format of the numbers.

    Example:
      >>> from jaxhpo import plot
      >>> figure, axes = plot.figure()
      >>> plot.bars(axes[0, 0], ["grid", "random"], {"test": ([0.92, 0.93], [0.01, 0.01])})
    """
    means, errors = np.moveaxis(np.asarray(list(series.values()), float), 1, 0)  # (labels, groups) each
    errors, positions, height = np.nan_to_num(errors), np.arange(len(names)), 0.8 / len(series)
    whisker = {"lw": 1, "capsize": 2, "ecolor": "0.1"}
    for row, label in enumerate(series):
        at, color = positions + (row - (len(series) - 1) / 2) * height, colors[row % len(colors)]
        drawn = axis.barh(at, means[row], height * 0.92, xerr=errors[row], label=label, color=color, error_kw=whisker)
        axis.bar_label(drawn, [format.format(mean) for mean in means[row]], padding=4, fontsize=8)
    lowest, highest = np.min(means - errors), np.max(means + errors)
    span = max(highest - lowest, 1e-3)
    axis.set_xlim(lowest - 0.25 * span, highest + 0.25 * span)
    axis.set_yticks(positions, names)
    axis.invert_yaxis()


def _saved(figure, path) -> Any:
    if path is not None:
        save(figure, path)
    return figure


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
    """Plots error against time of every method in a `Comparison`; marker areas grow with the logarithm of memory.

    Methods that are accurate on this problem have filled markers, the recommended one in blue; the others are hollow.
    Above the dotted line a hypergradient is not accurate. Methods without numbers are listed in the legend alone.

    Args:
      comparison: from `jaxhpo.compare`.
      path: the file to write, or None.

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
    floor = min([1.0, *errors]) / 10  # stands for an error of zero: the reference itself
    axis.set(xscale="log", yscale="log", ylabel="relative error of the hypergradient")
    axis.set_xlabel("time of one hypergradient, in inner steps")
    best = [row.accurate for row in comparison.rows if row.name == comparison.recommended]
    verdict = "nearest, but not accurate" if best == [False] else "recommended here"
    axis.set_title(f"{verdict}: {comparison.recommended or 'none of these'}", fontsize=11)
    axis.set_ylim(floor / 5, 10 * max([1.0, *errors]))
    axis.axhline(1e-2, color="0.6", linestyle=":", zorder=0)
    for number, row in enumerate(comparison.rows, 1):
        color = "tab:blue" if row.name == comparison.recommended else "0.4"
        style = {"color": color if row.accurate else "white", "edgecolors": color, "linewidths": 1.4}
        area, error = 120 * (1 + np.log10(1 + (row.copies or 0.0))), row.relative_error
        at = (np.nan, np.nan) if error is None else (row.gradients, max(error, floor))
        axis.scatter(*at, s=area, label=f"{number}  {_caption(row)}", alpha=0.9, zorder=3, **style)
        if error is not None:
            text = {"color": "white" if row.accurate else "0.2", "ha": "center", "va": "center", "zorder": 4}
            axis.annotate(str(number), at, fontsize=8, **text)
    plain_log_ticks(axis.xaxis)
    axis.margins(x=0.1)
    legend = axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5), labelspacing=0.9)
    for handle in legend.legend_handles:
        handle.set_sizes([60.0])
    return _saved(canvas, path)


def _caption(row) -> str:
    if row.error is not None:
        return f"{row.name}: raised an error"
    if not row.finite:
        return f"{row.name}: not finite"
    memory = "" if row.copies is None else f", {row.copies:.3g} copies"
    blind = f",\nblind to {', '.join(row.blind)}" if row.blind else ""
    return f"{row.name}{' = the reference' if row.relative_error == 0 else ''}{memory}{blind}"


def run(source: TuneResult | str | os.PathLike, path: str | os.PathLike | None = None) -> Any:
    """Plots a run of `tune`: its convergence, the hypergradient's norm, the paths of the hyperparameters.

    Of a population, it shows the best member. A hyperparameter of up to eight entries has a line for each, a larger one
    its median, quartiles and extremes. At most six panels more show a vector with 9 to 1024 entries (a schedule) over
    its index at the first, the middle and the last step, or a matrix at the last step as a heat map.

    Args:
      source: the result of `tune`, or its `run_dir`, also during the run.
      path: the file to write, or None.

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
    lines = 1 + -(-len(large) // 3)
    canvas, axes = figure(lines, 3, width=14.0, height=4.0 * lines)
    first, second, third, *others = axes.flat
    _convergence(first, columns)
    _norms(second, columns)
    _paths(third, hparams)
    for axis, name in zip(others, large, strict=False):
        _values(axis, name, hparams[name])
    for axis in others[len(large) :]:
        axis.set_visible(False)
    canvas.suptitle(which)
    return _saved(canvas, path)


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
    _log_if_wide(axis, value)
    axis.set(xlabel="outer step", title="Convergence")
    axis.legend(frameon=False)


def _norms(axis, columns) -> None:
    """The hypergradient's norm, with a row of marks for every remedy that acted."""
    axis.semilogy(columns["hypergradient_norm"], lw=1, color="tab:blue")
    counts = {name[len("remedies['") : -2]: x for name, x in columns.items() if name.startswith("remedies") and x.any()}
    for i, (name, x) in enumerate(counts.items()):
        at, label = np.flatnonzero(x), f"{name.replace('_', ' ')}: {int(x.sum())}"
        style = {"ms": 8, "color": f"C{i + 1}", "transform": axis.get_xaxis_transform()}
        axis.plot(at, np.full(at.size, 0.03 + 0.05 * i), "|", label=label, **style)
    if counts:
        axis.legend(frameon=False)
    axis.set(xlabel="outer step", title="Norm of the hypergradient")


def _paths(axis, hparams) -> None:
    for i, (name, values) in enumerate(hparams.items()):
        short, flat = name.removeprefix("hparams") or "hparams", values.reshape(len(values), -1)
        if flat.shape[1] <= FEW:
            axis.plot(flat, lw=1, color=f"C{i}")[0].set_label(short)
            continue
        low, first, median, third, high = np.quantile(flat, [0, 0.25, 0.5, 0.75, 1], axis=1)
        axis.plot(median, lw=1, color=f"C{i}", label=f"{short}, {flat.shape[1]} entries")
        for bounds, alpha in (((first, third), 0.3), ((low, high), 0.12)):
            axis.fill_between(np.arange(len(flat)), *bounds, color=f"C{i}", alpha=alpha, linewidth=0)
    _log_if_wide(axis, np.concatenate([x.ravel() for x in hparams.values()]))
    axis.set(xlabel="outer step", title="Hyperparameters")
    axis.legend(frameon=False, fontsize=8)


def _log_if_wide(axis, values) -> None:
    if np.nanmin(values) > 0 and np.nanmax(values) > 20 * np.nanmin(values):
        axis.set_yscale("log")


def _values(axis, name, values) -> None:
    if values.ndim == 3:
        image(axis, values[-1], label=name, colormap="viridis")
        axis.set_title(f"{name} at the last step")
        return
    for step in sorted({0, len(values) // 2, len(values) - 1}):
        axis.plot(values[step].ravel(), lw=1, label=f"step {step}")
    axis.set(xlabel="index", title=name)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.legend(frameon=False)
