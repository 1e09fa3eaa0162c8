"""
Figures of what findings.py has measured (report.py says what `found` is), and real.py.
"""
import numpy as np
from matplotlib.figure import Figure
from report import DELTAS, settings_of

STYLES = [  # color, line, marker
    ("#12355b", "-", "o"),
    ("#d1495b", "--", "s"),
    ("#2e8b57", "-.", "^"),
    ("#7b5ea7", ":", "D"),
    ("#b07d10", (0, (6, 1)), "v"),
]
ABLATIONS = [  # a panel each: experiment, title, metrics, what stands below the axis
    ("kl", "Weight of the KL,\nEM-RL token", "greedy|T = 1", "β"),
    ("rollouts", "Responses a prompt,\nEM-RL sequence", "greedy|T = 1", "N"),
    ("coef", "Weight of the entropy,\nEM-RL token", "greedy|T = 1", "--entropy-coef"),
    ("descent", "EM-INF:\nsteps of descent", "accuracy", "steps"),
]
SHIFT = [
    ("shift", "Accuracy", "greedy|sample|em-inf|adaptive-temperature", "operations"),
    ("shift", "Calibration error", "ECE greedy|ECE sample|ECE em-inf|ECE adaptive-temperature",
     "operations (7 and more were never seen)"),
]
GAINS = {"gain greedy": "gain, greedy", "gain T = 1": "gain, T = 1",
         "forecast": "forecast for T = 1, first 0.1 nats"}


def new_figure(columns, rows=1, height=4):
    figure = Figure(figsize=(10, height), layout="constrained")
    return figure, figure.subplots(rows, columns, sharey=True, squeeze=False).flat


def draw(axis, places, lines, **labels):
    """Means over seeds, in percent, with bars of one sd. `places` stand below the axis, and
    `lines` are {name: for each place, the values by seed}."""
    assert len(lines) <= len(STYLES), list(lines)
    for (name, values), (color, line, marker) in zip(lines.items(), STYLES):
        means = [100 * np.mean(some) for some in values]
        sds = [100 * np.std(some, ddof=len(some) > 1) for some in values]
        style = dict(color=color, marker=marker, linestyle=line, capsize=3)
        axis.errorbar(places, means, sds, label=name, **style)
    axis.set(**labels)
    axis.legend(frameon=False, fontsize=9)


def by_setting(found, panels):
    """A line for each metric, against the settings of the experiment."""
    figure, axes = new_figure(len(panels))
    for axis, (experiment, title, metrics, below) in zip(axes, panels):
        lines = {}
        for metric in metrics.split("|"):
            settings = settings_of(found, experiment, metric)
            lines[metric] = [found[experiment, setting, metric] for setting in settings]
        draw(axis, settings, lines, xlabel=below, title=title)
    axes[0].set(ylabel="%", ylim=(0, 105))
    return figure


def by_threshold(found):
    """A line for each family of problems, against the threshold."""
    figure, (axis,) = new_figure(1)
    places, lines = ["none", *DELTAS], {}
    for family in settings_of(found, "threshold", "none"):
        lines[family] = [found["threshold", family, metric] for metric in places]
    draw(axis, places, lines, ylabel="% right, T = 1", ylim=(0, 105), title="EM-INF by family")
    return figure


def by_base_model(found, experiment, methods, below):
    """What each method gains, and the forecast of that, against the base model."""
    figure, axes = new_figure(len(methods))
    places = sorted(settings_of(found, experiment, "majority over greedy"), key=int)
    for axis, method in zip(axes, methods):
        lines = {}
        for metric, name in GAINS.items():
            lines[name] = [found[experiment, f"{place}, {method}", metric] for place in places]
        draw(axis, places, lines, title=method, xlabel=below)
        axis.axhline(0, color="black", linewidth=1)
    axes[0].set_ylabel("points")
    return figure


def by_step(curves):
    """Greedy accuracy of each reward's runs. `curves`: {setting: metrics.csv of each seed}."""
    names = [name for name in curves if not name.endswith(", fast")]
    figure, axes = new_figure(4, rows=-(-len(names) // 4), height=7)
    for axis, name in zip(axes, names):
        for speed, label, (color, line, _) in [
            ("", "default rate", STYLES[0]), (", fast", "ten times as fast", STYLES[1]),
        ]:
            values = []
            for rows in curves[name + speed]:
                measured = [row for row in rows if "val_greedy" in row]
                values.append([100 * row["val_greedy"] for row in measured])
            steps = [row["step"] for row in measured]
            mean, sd = np.mean(values, axis=0), np.std(values, axis=0, ddof=len(values) > 1)
            axis.plot(steps, mean, color=color, linestyle=line, label=label)
            axis.fill_between(steps, mean - sd, mean + sd, color=color, alpha=0.15)
        axis.set(title=name, ylim=(0, 105))
    axes[0].legend(frameon=False, fontsize=9)
    figure.supxlabel("step")
    figure.supylabel("% right, greedy")
    return figure


def draw_all(found, curves, folder):
    """Write findings-*.png."""
    em_rl = "token", "sequence"
    shares, schools = "confident answers that are right, %", "steps of pretraining"
    figures = {
        "ablations": by_setting(found, ABLATIONS),
        "shift": by_setting(found, SHIFT),
        "threshold": by_threshold(found),
        "zoo": by_step(curves),
        "fails": by_base_model(found, "fails", em_rl, shares),
        "capability": by_base_model(found, "capability", ("EM-FT", *em_rl), schools),
    }
    for name, figure in figures.items():
        for axis in figure.axes:
            axis.spines[["top", "right"]].set_visible(False)
        figure.savefig(folder / f"findings-{name}.png", dpi=130)


def draw_training(curves, labels, path):
    """Write a panel for each of `labels` {curve: what its axis says}, against the step, with a
    line for each run of `curves` {run: {curve: values}}."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.subplots(1, len(labels))
    for axis, (name, label) in zip(axes, labels.items()):
        for number, (run, values) in enumerate(curves.items()):
            color, _, marker = STYLES[number % len(STYLES)]
            line = ["-", ":", "--", "-."][number // len(STYLES) % 4]
            steps = range(1, len(values[name]) + 1)
            axis.plot(steps, values[name], color=color, linestyle=line, marker=marker, label=run,
                      markersize=3)
        axis.set(xlabel="step", ylabel=label)
        axis.set_ylim(0, 1.05 * axis.get_ylim()[1])
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3,
                  frameon=False, fontsize=9)
    figure.savefig(path, dpi=130)
