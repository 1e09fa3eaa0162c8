"""
Scores of graded samples, which are the dicts that eval.graded describes: accuracy and its
intervals, pass@k, calibration, and a forecast of what EM will do to the model.
"""
import math
from collections import Counter

import numpy as np

from tasks.answers import last_box, most_agreed
from tasks.errors import UserError

CONFIDENCE = {  # em_rl.py's rewards, as means over tokens: (a sample's key, its sign)
    "token": ("entropy", -1),
    "sequence": ("logprob", 1),
}
ROW = (
    "| {name} | {accuracy:.1%}{spread} | {low:.1%} to {high:.1%} | {passed} | {answered:.1%} "
    "| {truncated:.1%} | {entropy:.3f} | {auroc:.3f} | {ece:.3f} | {length:.1f} "
    "| {tokens:,.0f} | {flops:.3g} | {seconds:.1f} |"
)
TABLE = """| | pass@1 | 95 % over problems | pass@k | answered | truncated | entropy | AUROC | ECE \
| length | tokens | FLOPs | seconds |
|---|---|---|---|---|---|---|---|---|---|---|---|---|
{rows}

pass@1: mean ± sd over seeds. Of one seed: tokens of the answers, FLOPs (2 x parameters x all \
tokens that went through the model), seconds.
Entropy: the model's own at T = 1, nats per token. AUROC: of that entropy, wrong against \
right. ECE: confidence exp(mean log-prob), 10 bins."""
DIAGNOSIS = """greedy {greedy:.1%}, T = 1 {sampled:.1%}, majority of {n} {majority:.1%}, \
pass@{n} {passed:.1%}; {distinct:.1f} distinct answers of {n}; ECE {ece:.3f}

| reward | the first 0.1 nats at T = 1, points | 95 % | right is the surest of {ks} | AUROC |
|---|---|---|---|---|"""

# -------------------------------------------------------------------------------- of numbers


def accuracy_interval(share, n, z=1.96):
    """(low, high): the 95 % Wilson interval of a share of n problems."""
    centre = share + z * z / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return (centre - half) / scale, (centre + half) / scale


def paired_interval(a, b, z=1.96):
    """(mean of b - a, low, high), a 95 % interval; a and b score the same problems in order."""
    gains = np.subtract(b, a, dtype=float)
    n, mean = len(gains), gains.mean()
    half = z * gains.std(ddof=1) / math.sqrt(n) if n > 1 else math.inf
    return mean, mean - half, mean + half


def pass_at_k(n, correct, k):
    """Probability that k of n responses, drawn without replacement, hold one of the `correct`
    right ones (unbiased)."""
    return 1 - math.comb(n - correct, k) / math.comb(n, k)


def surest_of_k(confidences, correct, k):
    """Probability that the surest of k of a problem's n responses, drawn without replacement,
    is right. k = 1 gives their accuracy."""
    n, chance = len(correct), 0.0
    for place, i in enumerate(np.argsort(-np.asarray(confidences), kind="stable")):
        # response i is the surest of k if the others are among the n - 1 - place less sure
        chance += correct[i] * math.comb(n - 1 - place, k - 1)
    return chance / math.comb(n, k)


def drift(confidences, correct, kl=0.1):
    """(change, low, high): what accuracy at T = 1 gains, to first order, when a policy moves
    `kl` nats a response towards its confidence r. Lists of each problem's n >= 2 responses.

    A natural policy gradient with reward r heads for pi(y) exp(eta r(y)), normalised. There
    accuracy has changed by eta Cov(r, correct) and the KL to pi is eta^2 Var(r) / 2, both
    within a problem and averaged over problems. The 95 % interval takes eta as known.
    nan where all are equally sure.
    """
    variances, covariances = [], []
    for r, right in zip(confidences, correct):
        matrix = np.cov(r, np.asarray(right, float))  # (2, 2)
        variances.append(matrix[0, 0])
        covariances.append(matrix[0, 1])
    variance = np.mean(variances)
    eta = math.sqrt(2 * kl / variance) if variance > 0 else math.nan
    return paired_interval(np.zeros(len(covariances)), np.multiply(eta, covariances))


def auroc(scores, labels):
    """Probability that a positive scores above a negative, ties counting half; nan where one
    kind is missing."""
    scores, labels = np.asarray(scores, float), np.asarray(labels, bool)
    positive, negative = scores[labels], np.sort(scores[~labels])
    if not len(positive) or not len(negative):
        return math.nan
    below = np.searchsorted(negative, positive, "left")
    not_above = np.searchsorted(negative, positive, "right")
    return float((below + not_above).mean() / 2 / len(negative))


def calibration(confidences, correct, bins=10):
    """(expected calibration error, rows of (mean confidence, accuracy, count)): a row for each
    of the equally wide bins of (0, 1] that is not empty. An edge belongs to the bin below it.
    The error is the mean of |accuracy - confidence| over bins, weighted by count."""
    confidences, correct = np.asarray(confidences, float), np.asarray(correct, float)
    places = np.clip(np.ceil(confidences * bins), 1, bins)
    ece, rows = 0.0, []
    for place in np.unique(places):
        inside = places == place
        confidence, accuracy = confidences[inside].mean(), correct[inside].mean()
        rows.append((confidence, accuracy, inside.sum()))
        ece += inside.mean() * abs(accuracy - confidence)
    return ece, rows


# -------------------------------------------------------------------------------- of samples


def values(samples, key):
    return np.array([sample[key] for sample in samples], float)


def by_problem(samples, key="correct"):
    """{id of a problem: its samples' values of `key`}."""
    groups = {}
    for sample in samples:
        groups.setdefault(sample["id"], []).append(sample[key])
    return groups


def main_problems(samples):
    """{(main problem, seed, k): is it right? It is if the k-th samples of all its steps are}."""
    drawn, right = Counter(), {}
    for sample in samples:
        if "main" in sample:
            step = sample["id"], sample["seed"]
            key = sample["main"], sample["seed"], drawn[step]
            drawn[step] += 1
            right[key] = right.get(key, True) and sample["correct"]
    return right


def calibration_of(samples):
    """`calibration` with confidence exp(mean log-prob of a response's tokens)."""
    return calibration(np.exp(values(samples, "logprob")), values(samples, "correct"))


def summary(samples):
    """Numbers of samples of one model, data set and decoder, of any seeds: a dict of

        problems, seeds, n      how many; n responses to a problem in a seed
        accuracy, low, high     with its 95 % interval over problems
        sd, pass                of accuracy over seeds, or None; {k: pass@k}
        answered, truncated     shares
        length, entropy         means: tokens of a response, nats of a token
        auroc, ece              of entropy, wrong against right; `calibration_of`
        tokens, flops, seconds  of one seed
        main, mains             accuracy on the problems that these are steps of (None without),
                                and how many they are
    """
    seeds = {}
    for sample in samples:
        seeds.setdefault(sample["seed"], []).append(sample)
    groups = []  # "correct" of the responses to a problem in a seed
    for some in seeds.values():
        groups += by_problem(some).values()
    n = min(len(group) for group in groups)
    passed = {}
    for k in sorted({2, 4, 8, 16, 32, 64, 128, n}):
        if 1 < k <= n:
            passed[k] = np.mean([pass_at_k(len(group), sum(group), k) for group in groups])
    mean = {}
    for key in "correct", "answered", "truncated", "length", "flops", "seconds":
        mean[key] = values(samples, key).mean()
    by_seed = [values(some, "correct").mean() for some in seeds.values()]
    problems = len(by_problem(samples))
    low, high = accuracy_interval(mean["correct"], problems)
    entropy, lengths = values(samples, "entropy"), values(samples, "length")
    a_seed = len(samples) / len(seeds)
    mains = main_problems(samples)
    return {
        "problems": problems,
        "n": n,
        "seeds": len(seeds),
        "accuracy": mean["correct"],
        "sd": np.std(by_seed, ddof=1) if len(seeds) > 1 else None,
        "low": low,
        "high": high,
        "pass": passed,
        "answered": mean["answered"],
        "truncated": mean["truncated"],
        "length": mean["length"],
        "entropy": entropy @ lengths / lengths.sum(),
        "auroc": auroc(entropy, values(samples, "correct") == 0),
        "ece": calibration_of(samples)[0],
        "tokens": mean["length"] * a_seed,
        "flops": mean["flops"] * a_seed,
        "seconds": mean["seconds"] * a_seed,
        "main": np.mean([*mains.values()]) if mains else None,
        "mains": len({main for main, *_ in mains}),
    }


def table(results):
    """{name: samples} -> Markdown, a row for each."""
    rows, lines = [], []
    for name, samples in results.items():
        numbers = summary(samples)
        spread = "" if numbers["sd"] is None else f" ± {numbers['sd']:.1%}"
        passed = ", ".join(f"{k}: {share:.1%}" for k, share in numbers["pass"].items())
        rows.append(ROW.format(name=name, spread=spread, passed=passed, **numbers))
        if numbers["mains"]:
            lines.append("\n{name}: {main:.1%} of {mains} main problems are right, in all of "
                         "their steps.".format(name=name, **numbers))
    return "\n".join([TABLE.format(rows="\n".join(rows)), *lines])


def compare(a, b):
    """Two {name: samples} -> Markdown: the paired difference of accuracy for each name, over
    the problems of both. UserError where there are none."""
    lines = ["| | problems | A | B | B - A | 95 % |", "|---|---|---|---|---|---|"]
    for name in a:
        first, second = by_problem(a[name]), by_problem(b.get(name, []))
        shared = [i for i in first if i in second]
        if shared:
            x = [np.mean(first[i]) for i in shared]
            y = [np.mean(second[i]) for i in shared]
            gain, low, high = paired_interval(x, y)
            lines.append(
                f"| {name} | {len(shared)} | {np.mean(x):.1%} | {np.mean(y):.1%} "
                f"| {gain:+.1%} | {low:+.1%} to {high:+.1%} |"
            )
    if len(lines) == 2:
        raise UserError(
            "--compare: no problem of one data set and decoder is in both; "
            f"A has {', '.join(a)}, and B has {', '.join(b)}"
        )
    return "\n".join(lines)


# ------------------------------------------------------------------------------ the forecast


def diagnosis(greedy, sampled):
    """Will EM help this model on these problems? Samples of greedy decoding, and of n >= 2
    responses a problem at T = 1 -> a dict.

    EM-RL moves towards the surer of a problem's responses, so it helps where these are right:
    see "rewards", the `forecast` of each reward. Beside the `summary` of sampled there are the
    accuracy of greedy, of sampled and of the majority of n, passed (pass@n), and distinct, how
    many answers there are among n.
    """
    right, texts = by_problem(sampled), by_problem(sampled, "response")
    numbers = summary(sampled)
    kept = [right[i][most_agreed(texts[i])] for i in texts]
    answers = [{last_box(text) for text in group} for group in texts.values()]
    return numbers | {
        "rewards": {reward: forecast(sampled, reward) for reward in CONFIDENCE},
        "greedy": summary(greedy)["accuracy"],
        "sampled": numbers["accuracy"],
        "passed": numbers["pass"][numbers["n"]],
        "majority": np.mean(kept),
        "distinct": np.mean([len(group) for group in answers]),
    }


def forecast(sampled, reward):
    """What EM-RL with this reward is going to do: a dict of

        drift, low, high  what the first 0.1 nats of KL a response gain, as `drift` says
        verdict           "likely helps" where that interval lies above 0, "harms" where it
                          lies below, else "too close to call"
        surest            {k: how often the surest of k responses is right}: a large k shows
                          where longer training leads. If this rises with k and then falls,
                          expect the same of accuracy
        auroc             of the reward, right against wrong, over all responses
    """
    key, sign = CONFIDENCE[reward]
    right = by_problem(sampled)
    sure = {i: sign * np.array(group) for i, group in by_problem(sampled, key).items()}
    change, low, high = drift(sure.values(), right.values())
    surest = {}
    for k in 1, *summary(sampled)["pass"]:
        surest[k] = np.mean([surest_of_k(sure[i], right[i], k) for i in right])
    verdict = "likely helps" if low > 0 else "too close to call"
    return {
        "drift": change,
        "low": low,
        "high": high,
        "verdict": "harms" if high < 0 else verdict,
        "surest": surest,
        "auroc": auroc(sign * values(sampled, key), values(sampled, "correct")),
    }


def diagnose(greedy, sampled):
    """`diagnosis` as text."""
    found = diagnosis(greedy, sampled)
    rewards = found["rewards"]
    ks = ", ".join(str(k) for k in rewards["token"]["surest"])
    lines = [DIAGNOSIS.format(ks=ks, **found)]
    for reward, told in rewards.items():
        change, low, high = [100 * told[key] for key in ("drift", "low", "high")]
        surest = ", ".join(f"{share:.1%}" for share in told["surest"].values())
        lines.append(
            f"| {reward} | {change:+.1f} | {low:+.1f} to {high:+.1f} | {surest} "
            f"| {told['auroc']:.3f} |"
        )
    for reward, told in rewards.items():
        lines.append(f"\nEM-RL with reward {reward} {advice(told, found['problems'])}")
    return "\n".join(lines)


def advice(told, problems):
    """The verdict of a `forecast` in words, and how long to follow it."""
    if told["verdict"] == "harms":
        return "harms: surer answers are worse ones."
    if told["verdict"] == "too close to call":
        return f"is too close to call with {problems} problems."
    text = "likely helps: surer answers are better ones."
    surest = told["surest"]
    best, n = max(surest, key=surest.get), max(surest)
    if surest[n] < surest[best] - 0.02:
        text += f" Not for long: the surest of {n} is right less often than that of {best}."
        text += " Stop early, or hold it with --beta."
    return text
