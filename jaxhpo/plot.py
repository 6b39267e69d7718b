"""Plots of comparisons and runs, and the matplotlib helpers they share; pyplot's global state is never touched."""

import functools
import os
import pathlib
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxhpo import Comparison, JaxhpoError, TuneResult
from jaxhpo._core.extra import needs_extra
from jaxhpo._tune import history, table
from jaxhpo._tune.history import Summary

FEW = 10  # lines in a panel: more entries are drawn as bands between their quantiles
PANELS = 6  # at most so many of large hyperparameters, and of metrics
# Distinct to the colour-blind: Okabe and Ito, Color Universal Design, 2008, jfly.uni-koeln.de/color
BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"
PALETTE = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY)
TITLE, LEGEND = 10, {"frameon": False, "fontsize": 9}  # of a panel; a picture's own title has 12 points
STRIP = 0.1  # of the height of `comparison`'s axes: where there is no error


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
        axis.set_prop_cycle(color=PALETTE)
    return canvas, axes


def save(figure: Any, path: str | os.PathLike, *, dpi: int = 180) -> None:
    """Writes a figure to a file, in the format of its extension.

    Args:
      figure: what `figure` returned.
      path: such as `"demo.png"` or `"demo.pdf"`; without an extension it is a PNG.
      dpi: dots per inch, for raster formats.

    Raises:
      JaxhpoError: a format that matplotlib does not write.

    Example:
      >>> from jaxhpo import plot
      >>> import pathlib, tempfile
      >>> path = pathlib.Path(tempfile.mkdtemp()) / "empty.png"
      >>> figure, axes = plot.figure()
      >>> plot.save(figure, path)
      >>> path.read_bytes()[1:4]
      b'PNG'
    """
    form = pathlib.Path(path).suffix[1:].lower() or "png"
    if form not in (known := figure.canvas.get_supported_filetypes()):
        raise JaxhpoError(f"`path` got {os.fspath(path)!r}: end it in one of .{', .'.join(sorted(known))}.")
    figure.savefig(path, dpi=dpi, format=form)


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
    long = max(shown.shape) > 4 * min(shown.shape)
    drawn = axis.imshow(shown, cmap=colormap, interpolation="nearest", aspect="auto" if long else "equal", **limits)
    axis.set_facecolor("0.85")
    axis.spines[:].set_visible(False)
    axis.set(xticks=[], yticks=[])
    axis.figure.colorbar(drawn, ax=axis, label=label, shrink=0.9)


def dots(
    axis: Any,
    names: Sequence[str],
    series: dict,
    *,
    colors: Sequence[str] | None = None,
    format: str = "{:.3f}",
) -> None:
    """Draws means as dots with an interval of plus and minus one standard error, one row per name.

    The dots of the first label are filled, those of the others hollow.

    Args:
      axis: matplotlib axes.
      names: of the rows, from top to bottom.
      series: label -> (means, standard errors), each with one number per row.
      colors: one per row; None takes blue for all.
      format: the format of the numbers beside the dots.

    Example:
      >>> from jaxhpo import plot
      >>> figure, axes = plot.figure()
      >>> plot.dots(axes[0, 0], ["grid", "random"], {"test": ([0.92, 0.93], [0.01, 0.01])})
    """
    means, errors = np.moveaxis(np.asarray(list(series.values()), float), 1, 0)  # (labels, rows) each
    errors, apart = np.nan_to_num(errors), 0.3
    for i, label in enumerate(series):
        for row, (mean, error) in enumerate(zip(means[i], errors[i], strict=True)):
            at, color = row + (i - (len(series) - 1) / 2) * apart, colors[row] if colors else BLUE
            style = {"color": color, "mfc": "white" if i else color, "ms": 6, "elinewidth": 1.6, "capsize": 3}
            axis.errorbar(mean, at, xerr=error or None, fmt="o", **style)
            axis.annotate(format.format(mean), (mean + error, at), (5, 0), **BESIDE)
        axis.plot([], [], "o", color="0.3", mfc="white" if i else "0.3", label=label)
    low, high = np.nanmin(means - errors), np.nanmax(means + errors)
    span = max(high - low, 1e-3)
    axis.set_xlim(low - 0.06 * span, high + 0.25 * span)  # room for the numbers
    axis.set_yticks(np.arange(len(names)), [_plain(name) for name in names])
    axis.set_ylim(len(names) - 0.4, -0.6)
    axis.grid(axis="x", color="0.9")
    axis.set_axisbelow(True)


BESIDE = {"textcoords": "offset points", "va": "center", "fontsize": 8}


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
    Above the dotted line a hypergradient is not accurate; in the grey strip there is no error, which the logarithmic
    axis has no place for. Methods without numbers are listed in the legend alone.

    Args:
      comparison: from `jaxhpo.compare`.
      path: the file to write, or None.

    Returns:
      The matplotlib `Figure`.

    Raises:
      ImportError: without matplotlib.

    Example:
      >>> from jaxhpo import plot
      >>> solver = jaxhpo.from_optax(lambda p, h, batch: (p - h) ** 2, optax.sgd(0.25))
      >>> def make_outer_loss(adjoint):
      ...     return lambda h: jaxhpo.solve(solver, solver.init(0.0, h), h, num_steps=3, adjoint=adjoint).params ** 2
      >>> rules = [jaxhpo.Unroll(), jaxhpo.Unroll(truncate=1)]
      >>> figure = plot.comparison(jaxhpo.compare(make_outer_loss, 1.0, rules, repeats=1, progress=False))
      >>> figure.axes[0].get_title()
      'Recommended here: Unroll()'
    """
    canvas, axes = figure(width=10.0, height=5.0)
    axis = axes[0, 0]
    errors = [row.relative_error for row in comparison.rows if row.relative_error]
    axis.set(xscale="log", yscale="log", ylabel="relative error of the hypergradient")
    axis.set_xlabel("time of one hypergradient, in inner steps")
    best = [row.accurate for row in comparison.rows if row.name == comparison.recommended]
    verdict = "Nearest, but not accurate" if best == [False] else "Recommended here"
    axis.set_title(f"{verdict}: {_plain(comparison.recommended or 'none of these')}", fontsize=12)
    low, high = min([1e-2, *errors]) / 3, 10 * max([1.0, *errors])
    strip = STRIP * any(row.relative_error == 0 for row in comparison.rows)
    axis.set_ylim(low * (low / high) ** (strip / (1 - strip)), high)
    axis.set_yticks([tick for tick in axis.get_yticks() if low <= tick <= high])
    axis.minorticks_off()
    axis.axhline(1e-2, color="0.6", linestyle=":", zorder=0)
    if strip:
        axis.fill_between([0, 1], 0, strip, transform=axis.transAxes, color="0.93", linewidth=0, zorder=0)
        axis.text(0.01, strip / 2, "no error", transform=axis.transAxes, va="center", color="0.4", fontsize=9)
    numbers = []
    for number, row in enumerate(comparison.rows, 1):
        is_best, error = row.name == comparison.recommended, row.relative_error
        color, area = BLUE if is_best else "0.4", 140 * (1 + np.log10(1 + (row.copies or 0.0)))
        style = {"color": color if row.accurate else "white", "edgecolors": color, "linewidths": 1.4}
        where = axis.get_xaxis_transform() if error == 0 else axis.transData
        at = (np.nan, np.nan) if error is None else (row.gradients or np.nan, error or strip / 2)
        label = f"{number}  {_caption(row)}"
        axis.scatter(*at, s=area, label=label, alpha=0.9, zorder=3 + is_best, transform=where, **style)
        same = [text for text in numbers if np.allclose(np.log(at), np.log(text.get_position()), atol=0.05)]
        if same:  # a marker hides the other: it has both numbers
            same[0].set_text(f"{same[0].get_text()}, {number}")
        elif error is not None:
            text = {"color": "white" if row.accurate else "0.2", "ha": "center", "va": "center", "zorder": 5}
            numbers.append(axis.text(*at, str(number), fontsize=9, transform=where, **text))
    times = [row.gradients or np.nan for row in comparison.rows if row.relative_error is not None]
    if times:
        axis.set_xlim(min(times) / 1.3, max(times) * 1.3)
        plain_log_ticks(axis.xaxis)
    legend = axis.legend(**LEGEND, loc="center left", bbox_to_anchor=(1.0, 0.5), labelspacing=0.9)
    for handle in legend.legend_handles:
        handle.set_sizes([60.0])
    return _saved(canvas, path)


def _caption(row) -> str:
    name = _plain(row.name)
    if row.error is not None:
        return f"{name}: raised an error"
    if not row.finite:
        return f"{name}: not finite"
    memory = "" if row.copies is None else f", {row.copies:.3g} copies"
    unseen = [f"part of {leaf}" if leaf in row.partly_blind else leaf for leaf in row.blind]
    blind = f",\nblind to {_plain(', '.join(unseen))}" if unseen else ""
    return f"{name}{' = the reference' if row.relative_error == 0 else ''}{memory}{blind}"


def run(source: TuneResult | str | os.PathLike, path: str | os.PathLike | None = None) -> Any:
    """Plots a run of `tune`, or a search: its convergence, the hypergradient's norm, hyperparameters, metrics of info.

    Of a population, it shows the best member; `plot.run(result.member(3))` draws another. A leaf of up to ten entries
    has a line for each, a larger one its median, and bands between its quartiles and its extremes. At most six panels
    more show a large hyperparameter: a matrix at the last step as a heat map; other leaves at the first, the middle and
    the last step, over their index where they follow a curve (a schedule, say), else sorted. At most six show a metric,
    of those that change during the run. With `record="error"` the norm has a band of plus and minus its error bar, to
    the foot of the axis where that is the larger of the two.

    Args:
      source: the result of `tune` or of a search, or a run's `run_dir`, also during the run.
      path: the file to write, or None.

    Returns:
      The matplotlib `Figure`.

    Raises:
      ImportError: without matplotlib.
      JaxhpoError: a folder without a history; a format that matplotlib does not write.

    Example:
      >>> from jaxhpo import plot
      >>> result = jaxhpo.tune(lambda h: (h - 3.0) ** 2, 0.0, optax.sgd(0.25), num_steps=3, progress=False)
      >>> figure = plot.run(result)
      >>> [axis.get_ylabel() for axis in figure.axes]
      ['loss', "norm, in the search's units", 'value, in natural units']
    """
    columns, which = table.columns_of_best(source)
    hparams, quantiles = _leaves(columns, "hparams")
    info, _ = _leaves(columns, "info")
    changing = {name: x for name, x in info.items() if len(x) == 1 or not (x == x[:1]).all()}
    large = [name for name, x in hparams.items() if x[0].size > FEW][:PANELS]
    everything = _pooled(hparams, quantiles)
    searched = "hypergradient_norm" not in columns
    unit = "trial" if searched else "outer step"
    panels: list[Callable] = [
        lambda axis: _convergence(axis, columns),
        *([] if searched else [lambda axis: _norms(axis, columns)]),
        lambda axis: _paths(axis, hparams, quantiles, everything),
        *(functools.partial(_values, name=name, values=hparams[name], beside=everything) for name in large),
        *(functools.partial(_metric, name=name, values=changing[name]) for name in list(changing)[:PANELS]),
    ]
    rows = -(-len(panels) // 2)
    canvas, axes = figure(rows, 2, width=10.0, height=3.4 * rows)
    for axis, draw in zip(axes.flat, panels, strict=False):
        axis.set_xlabel(unit)
        axis.xaxis.get_major_locator().set_params(integer=True)
        draw(axis)
        if searched and axis.get_xlabel() == unit:
            _as_trials(axis)
        axis.title.set_fontsize(TITLE)
        if axis.get_xlabel() == unit:
            last = len(columns["value"]) - 1
            axis.set(xlim=(-0.04 * last, 1.04 * last)) if last else axis.set(xlim=(-0.5, 0.5), xticks=[0])
        if not np.isfinite(axis.dataLim.intervaly).all():
            axis.set_yticks([])  # nothing is finite, of which numbers would say something
        labels = axis.get_legend_handles_labels()[1]
        if labels:
            # It would hide lines, or bands, which matplotlib does not avoid.
            below = axis.collections or (len(labels) > 3 and max(map(len, labels)) > 20)
            place = {"loc": "upper left", "bbox_to_anchor": (0, -0.2)} if below else {}
            axis.legend(**LEGEND, **place)
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    if which:
        result = "result" if isinstance(source, TuneResult) else f"jaxhpo.load({os.fspath(source)!r})"
        canvas.suptitle(_plain(f"{which}; `plot.run({result}.member(i))` draws another", 100))
    return _saved(canvas, path)


def _as_trials(axis) -> None:
    """Turns curves of a run into points of a search: no path leads from trial to trial."""
    for line in axis.lines:
        if line.get_label() != "best so far":
            line.set(linestyle="none", marker=".", markevery=None)
        if line.get_label() == "score":
            line.set_label("of complete trials")
    title = axis.get_title()
    axis.set_title(title.replace("step", "trial") if title.startswith("Best") else title.split(":")[0])


def _leaves(columns, root) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Returns what is below a root, by name: the leaves, and the quantiles (steps, 5) of those that are summed up."""
    found = {name: x for name, x in columns.items() if re.match(rf"{root}($|[\[.])", name)}
    quantiles, last = {}, f".{Summary._fields[-1]}"
    for leaf in [name.removesuffix(last) for name in found if name.endswith(last)]:
        fields = [f"{leaf}.{field}" for field in Summary._fields]
        if found.keys() >= set(fields):
            quantiles[leaf] = np.stack([found.pop(field) for field in fields], axis=-1)[:, :5]
    whole, summed_up = (
        history.distinct((_short(n), _real(x)) for n, x in part.items() if x.size) for part in (found, quantiles)
    )
    return whole, summed_up


def _short(name: str) -> str:
    """Returns the name of a leaf as it is read: of `hparams['layer']['bias']`, `layer.bias`."""
    own = name.removeprefix("hparams") or name
    read = re.sub(r"""\[(['"])(.*?)\1\]""", r".\2", own).removeprefix(".")
    return _plain(own if read.startswith("_") or not read else read)  # a label that begins so is not drawn


def _real(values) -> np.ndarray:
    """Returns floats, with NaN in place of infinities; of complex numbers both parts."""
    values = np.stack([values.real, values.imag], -1) if np.iscomplexobj(values) else values.astype(float)
    return np.where(np.isfinite(values), values, np.nan)


def _plain(text: str, most: int = 40) -> str:
    """Returns a name to be drawn as it is, without a formula between two dollars; a long one without its middle."""
    text = text if len(text) <= most else f"{text[: most // 2]}...{text[-most // 2 :]}"
    return text.replace("$", r"\$")


def _change(name, values) -> str:
    """Returns a title: the first and the last finite value."""
    ends = values[np.isfinite(values)][[0, -1]] if np.isfinite(values).any() else ()
    return f"{name}: {' to '.join(dict.fromkeys(f'{x:.4g}' for x in ends)) or 'no finite value'}"


def _line(axis, values, label="_", **style) -> None:
    """Draws values over the outer steps, with a point where there is no neighbour to draw a line to."""
    known = np.isfinite(np.pad(values, 1, constant_values=np.nan))
    alone = np.flatnonzero(known[1:-1] & ~known[:-2] & ~known[2:])
    points = {"marker": "o", "ms": 5, "markevery": alone.tolist()} if alone.size else {}
    axis.plot(values, label=label, lw=1.3, **points, **style)


def _entries(axis, values, color, label="_", extremes=True) -> None:
    """Draws a line for each of a few entries, else their quantiles."""
    flat = values.reshape(len(values), -1)
    if flat.shape[1] > FEW:
        label = f"{label}, {flat.shape[1]} entries".removeprefix("_, ")
        return _bands(axis, np.quantile(flat, [0, 0.25, 0.5, 0.75, 1], axis=1).T, color, label, extremes)
    for i, entry in enumerate(flat.T):
        _line(axis, entry, "_" if i else label, color=color)
    return None


def _bands(axis, quantiles, color, label, extremes=True) -> None:
    """Draws the median over bands between the quartiles and, unless others would be hidden, between the extremes."""
    low, first, median, third, high = quantiles.T
    _line(axis, median, f"{label}: median, quartiles{', extremes' * extremes}", color=color)
    at = np.arange(len(median)) if len(median) > 1 else np.array([-0.3, 0.3])  # a band of one step has a width too
    for lower, upper, alpha in ((first, third, 0.3), (low, high, 0.15))[: 1 + extremes]:
        axis.fill_between(at, lower, upper, color=color, alpha=alpha, linewidth=0)


def _convergence(axis, columns) -> None:
    value, score = _real(columns["value"]), _real(columns["score"])
    best = np.fmin.accumulate(score)
    _line(axis, value, "outer loss", color=BLUE)
    if not np.array_equal(value, score, equal_nan=True):
        _line(axis, score, "score", color=ORANGE)
    _line(axis, best, "best so far", color="0.3", ls="--")
    if (skipped := np.flatnonzero(columns.get("remedies['skipped_steps']", []))).size:
        at_the_bottom = axis.get_xaxis_transform()
        axis.plot(skipped, np.full(skipped.size, 0.03), "x", color=VERMILION, label="skipped", transform=at_the_bottom)
    _log(axis, value, 20.0)
    at = f", at step {np.nanargmin(score)}" if np.isfinite(score).any() else ""
    axis.set(ylabel="loss", title=_change("Best loss", best) + at)


def _norms(axis, columns) -> None:
    """The hypergradient's norm, with a row of marks for every remedy that acted."""
    norm = _real(columns["hypergradient_norm"])
    norm = np.where(norm > 0, norm, np.nan)  # of a step without a score, in a logarithmic axis
    _line(axis, norm, color=BLUE)
    _log(axis, norm)
    if "error" in columns and np.isfinite(error := _real(columns["error"])).any():
        known, at = np.isfinite(error), np.arange(len(error))
        lower, whole = norm - error, bool((error >= norm).any())
        # A logarithmic axis has no zero: where the error is larger than the norm, the band reaches its foot.
        foot = np.nanmin([norm, np.where(lower > 0, lower, np.nan)]) / 1.5 if axis.get_yscale() == "log" else 0.0
        label = "± error bar" + ", to the foot where it reaches zero" * whole
        band = {"color": BLUE, "alpha": 0.2, "linewidth": 0, "label": label}
        axis.fill_between(at[known], np.maximum(lower, foot)[known], (norm + error)[known], **band)
        if whole:
            axis.set_ylim(bottom=foot)
    counts = {name[len("remedies['") : -2]: x for name, x in columns.items() if name.startswith("remedies") and x.any()}
    for i, (name, x) in enumerate(counts.items()):
        at, label = np.flatnonzero(x), f"{name.replace('_', ' ')}: {int(x.sum())}"
        style = {"ms": 8, "color": PALETTE[(i + 1) % len(PALETTE)], "transform": axis.get_xaxis_transform()}
        axis.plot(at, np.full(at.size, 0.03 + 0.05 * i), "|", label=label, **style)
    axis.set(ylabel="norm, in the search's units", title=_change("Norm of the hypergradient", norm))


def _paths(axis, leaves, quantiles, everything) -> None:
    small = {name: x for name, x in leaves.items() if x[0].size <= FEW}
    if len(small) > FEW:
        pooled = np.concatenate([x.reshape(len(x), -1) for x in small.values()], axis=1)
        leaves = {f"{len(small)} small leaves": pooled} | {n: x for n, x in leaves.items() if n not in small}
    drawn = [(_entries, item) for item in leaves.items()] + [(_bands, item) for item in quantiles.items()]
    alone = len(quantiles) + sum(x[0].size > FEW for x in leaves.values()) == 1
    for i, (draw, (name, values)) in enumerate(drawn[:FEW]):
        draw(axis, values, PALETTE[i % len(PALETTE)], name, alone)
    if drawn[FEW:]:
        axis.plot([], [], " ", label=f"and {len(drawn) - FEW} more leaves")
    if not everything.size:
        axis.set_title("No hyperparameters")
        return
    _log(axis, everything, 20.0)
    axis.set(ylabel="value, in natural units", title=_range("Hyperparameters", everything[-1]))


def _pooled(leaves, quantiles) -> np.ndarray:
    """Returns all values (steps, ...) of the hyperparameters."""
    values = [x.reshape(len(x), -1) for x in (*leaves.values(), *quantiles.values())]
    return np.concatenate(values, axis=1) if values else np.zeros((1, 0))


def _range(name, values) -> str:
    """Returns a title: the lowest and the highest of the last values."""
    known = values[np.isfinite(values)]
    ends = dict.fromkeys(f"{x:.4g}" for x in (known.min(), known.max())) if known.size else ("no finite value",)
    return f"{name}: {' to '.join(ends)} in the end"


def _log(axis, values, least: float = 5.0, like=None) -> None:
    """Makes the axis logarithmic if the values are positive, and the largest at least so many times the smallest.

    With `like`, the values of another axis, if that one is.
    """
    known, others = (x[np.isfinite(x)] for x in (values, values if like is None else like))
    if known.size and others.min() > 0 and others.max() >= least * others.min():
        axis.set_yscale("log")
        if known.max() < 100 * known.min():
            plain_log_ticks(axis.yaxis)


def _values(axis, name, values, beside) -> None:
    """One large leaf (steps, ...): a matrix as a heat map, others as curves at three steps, scaled as `beside`."""
    values = values.reshape(len(values), *(n for n in values.shape[1:] if n > 1))
    title = _range(f"{name}, {values[0].size} entries", values[-1])
    axis.set_title(title if len(title) <= 60 else title.replace(": ", ":\n"))
    if values.ndim == 3:
        image(axis, values[-1], label="value", colormap="viridis")
        axis.set(xlabel=f"{values.shape[2]} columns", ylabel=f"{values.shape[1]} rows")
        return
    flat = values.reshape(len(values), -1)
    is_curve = np.abs(np.diff(flat[-1])).sum() <= 4 * np.ptp(flat[-1])
    steps = sorted({0, len(flat) // 2, len(flat) - 1})
    for step, color in zip(steps, ("0.65", SKY, BLUE)[-len(steps) :], strict=True):
        axis.plot(flat[step] if is_curve else np.sort(flat[step]), color=color, lw=1.5, label=f"step {step}")
    _log(axis, flat[steps], 20.0, like=beside)
    axis.set(xlabel="index" if is_curve else "rank: entries are sorted", ylabel="value, in natural units")


def _metric(axis, name, values) -> None:
    _entries(axis, values, BLUE)
    _log(axis, values, 20.0)
    title = _change(name, values) if values.ndim == 1 else _range(name, values[-1])
    axis.set(ylabel=name, title=title)
