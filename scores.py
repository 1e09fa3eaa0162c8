"""
Scores of graded samples: accuracy with its intervals, pass@k, calibration, how well entropy tells wrong from right. Pure functions of
numbers, and the table and figure made of them; no model, and nothing is run.

A sample is what eval.evaluate returns for a problem: a dict with id, seed, correct, answered, truncated, length, entropy, logprob, flops, seconds.
"""
import math

import numpy as np


def accuracy_interval(share, n, z=1.96):
    """(low, high): the 95 % Wilson interval of a share of n problems."""
    centre, half = share + z * z / (2 * n), z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return (centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)


def paired_interval(a, b, z=1.96):
    """(difference, low, high): mean of b - a over problems and its 95 % interval; a and b are scores of the same problems, in one order."""
    d = np.asarray(b, float) - np.asarray(a, float)
    half = z * d.std(ddof=1) / math.sqrt(len(d)) if len(d) > 1 else math.inf
    return d.mean(), d.mean() - half, d.mean() + half


def pass_at_k(n, correct, k):
    """Probability that k of n responses, drawn without replacement, hold a right one, `correct` being right: unbiased for pass@k."""
    return 1 - math.comb(n - correct, k) / math.comb(n, k)


def surest_of_k(confidences, correct, k):
    """Probability that the surest of k of a problem's n responses, drawn without replacement, is right. k = 1: their mean accuracy."""
    right, n = np.asarray(correct, float)[np.argsort(-np.asarray(confidences), kind="stable")], len(correct)
    return float(sum(math.comb(n - 1 - place, k - 1) * right[place] for place in range(n - k + 1)) / math.comb(n, k))


def drift(confidences, correct, kl=0.1):
    """(change, low, high): what accuracy at T = 1 gains, to first order, when a policy moves `kl` nats a response towards its confidence.

    Tilted to pi_eta(y) ~ pi(y) exp(eta r(y)), which is where a natural policy gradient with reward r heads, accuracy changes by eta Cov(r, correct)
    and the KL to pi is eta^2 Var(r) / 2: covariance and variance within a problem, means over problems. `confidences` r and `correct` are
    lists of each problem's n >= 2 responses. The 95 % interval is over problems, at that eta. nan where all are equally sure.
    """
    covariances = [np.cov(r, c)[0, 1] for r, c in zip(confidences, np.asarray(correct, float))]
    variance = np.mean([np.var(r, ddof=1) for r in confidences])
    eta = math.sqrt(2 * kl / variance) if variance > 0 else math.nan
    return paired_interval(np.zeros(len(covariances)), np.multiply(covariances, eta))


def auroc(scores, labels):
    """Probability that a positive scores above a negative, ties counting half; nan without both kinds."""
    scores, labels = np.asarray(scores, float), np.asarray(labels, bool)
    positive, negative = scores[labels], np.sort(scores[~labels])
    if not len(positive) or not len(negative):
        return math.nan
    below = np.searchsorted(negative, positive, "left") + np.searchsorted(negative, positive, "right")
    return float(below.mean() / 2 / len(negative))


def calibration(confidences, correct, bins=10):
    """(ece, rows): expected calibration error, the mean of |accuracy - confidence| over equally wide bins of (0, 1], weighted by their
    count; and (mean confidence, accuracy, count) of each bin that is not empty."""
    confidences, correct = np.asarray(confidences, float), np.asarray(correct, float)
    which = np.clip(np.ceil(confidences * bins).astype(int) - 1, 0, bins - 1)
    rows = [(confidences[which == b].mean(), correct[which == b].mean(), int((which == b).sum())) for b in np.unique(which)]
    return sum(abs(accuracy - confidence) * count for confidence, accuracy, count in rows) / len(correct), rows


def by_problem(samples, key="correct"):
    """{problem's id: its samples' values of `key`}."""
    groups = {}
    for sample in samples:
        groups.setdefault(sample["id"], []).append(sample[key])
    return groups


def summary(samples):
    """Means over samples of one model, data set and decoder, of any seeds: a dict of problems, n (responses a problem and seed), seeds,
    accuracy, sd (over seeds), low, high (95 % interval of accuracy over problems), pass ({k: pass@k}), answered, truncated (shares), length
    (tokens), entropy (nats, mean over all tokens), auroc (of entropy, wrong against right), ece (with confidence exp(mean log-prob of the
    response's tokens)), and of one seed tokens (of the answers), flops and seconds."""
    mean = lambda key: float(np.mean([sample[key] for sample in samples]))
    seeds = {sample["seed"]: [s for s in samples if s["seed"] == sample["seed"]] for sample in samples}
    groups = [list(by_problem(seed).values()) for seed in seeds.values()]
    by_seed = [np.mean([s["correct"] for s in seed]) for seed in seeds.values()]
    low, high = accuracy_interval(mean("correct"), len(by_problem(samples)))
    n = len(groups[0][0])  # responses to a problem in a seed
    ks = sorted({k for k in (2, 4, 8, 16, 32, 64, 128) if k < n} | ({n} if n > 1 else set()))
    per_seed = lambda key: sum(sample[key] for sample in samples) / len(seeds)
    return {"problems": len(by_problem(samples)), "n": n, "seeds": len(seeds), "accuracy": mean("correct"),
            "sd": float(np.std(by_seed, ddof=1)) if len(seeds) > 1 else None, "low": low, "high": high,
            "pass": {k: float(np.mean([pass_at_k(n, sum(g), k) for group in groups for g in group])) for k in ks},
            "answered": mean("answered"), "truncated": mean("truncated"), "length": mean("length"),
            "entropy": sum(s["entropy"] * s["length"] for s in samples) / sum(s["length"] for s in samples),
            "auroc": auroc([s["entropy"] for s in samples], [not s["correct"] for s in samples]),
            "ece": calibration([math.exp(s["logprob"]) for s in samples], [s["correct"] for s in samples])[0],
            "tokens": per_seed("length"), "flops": per_seed("flops"), "seconds": per_seed("seconds")}


def table(results):
    """{name: samples} -> Markdown, a row for each."""
    lines = ["| | pass@1 | 95 % over problems | pass@k | answered | truncated | entropy | AUROC | ECE | length | tokens | FLOPs | seconds |"]
    lines.append("|---" * (lines[0].count("|") - 1) + "|")
    for name, samples in results.items():
        r = summary(samples)
        sd = f" ± {r['sd']:.1%}" if r["sd"] is not None else ""
        passed = ", ".join(f"{k}: {share:.1%}" for k, share in r["pass"].items())
        lines.append(f"| {name} | {r['accuracy']:.1%}{sd} | {r['low']:.1%} to {r['high']:.1%} | {passed} | {r['answered']:.1%} | "
                     f"{r['truncated']:.1%} | {r['entropy']:.3f} | {r['auroc']:.3f} | {r['ece']:.3f} | {r['length']:.1f} | {r['tokens']:,.0f} | "
                     f"{r['flops']:.3g} | {r['seconds']:.1f} |")
    return "\n".join(lines + ["", "pass@1: mean ± sd over seeds. Of one seed: tokens of the answers, FLOPs (2 x parameters x all tokens that went through "
                              "the model), seconds.", "Entropy: the model's own at T = 1, nats per token. AUROC: of that entropy, wrong against right "
                              "answers. ECE: confidence exp(mean log-prob), 10 bins."])


def reliability_plot(results, path):
    """Accuracy against confidence in 10 bins, a line for each of {name: samples}; a dot's area is the bin's share."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(5.2, 4.6), layout="constrained")
    axis.plot([0, 1], [0, 1], color="0.6", linestyle=":", label="calibrated")
    for i, (name, samples) in enumerate(results.items()):
        ece, rows = calibration([math.exp(s["logprob"]) for s in samples], [s["correct"] for s in samples])
        x, y, count = zip(*rows)
        axis.plot(x, y, color=f"C{i}", linestyle=("-", "--", "-.")[i % 3], label=f"{name} (ECE {ece:.2f})")
        axis.scatter(x, y, s=[8 + 300 * c / len(samples) for c in count], color=f"C{i}", marker="os^Dv"[i % 5], alpha=0.7)
    axis.set(xlabel="confidence: exp(mean log-prob of the answer's tokens)", ylabel="share right", xlim=(0, 1.02), ylim=(-0.02, 1.02),
             title="Is the model as often right as it is sure?")
    axis.legend(frameon=False, fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def compare(a, b):
    """Two {name: samples} -> Markdown: for each data set and decoder of both, the paired difference of accuracy over the problems of both."""
    lines = ["| | problems | A | B | B - A | 95 % |", "|---|---|---|---|---|---|"]
    for name in [name for name in a if name in b]:
        first, second = by_problem(a[name]), by_problem(b[name])
        both = [i for i in first if i in second]
        x, y = ([float(np.mean(group[i])) for i in both] for group in (first, second))
        difference, low, high = paired_interval(x, y)
        lines.append(f"| {name} | {len(both)} | {np.mean(x):.1%} | {np.mean(y):.1%} | {difference:+.1%} | {low:+.1%} to {high:+.1%} |")
    if len(lines) == 2:
        raise ValueError(f"--compare: nothing in common; A has {', '.join(a)}, and B has {', '.join(b)}")
    return "\n".join(lines)
