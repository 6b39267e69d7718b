"""Small matplotlib pieces that draw into given axes; nothing touches pyplot's global state, so all work headless."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxhpo import Comparison


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
