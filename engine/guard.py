"""
When has a run collapsed? Judged without labels, from its metrics.
"""


def collapsed(rows, factor, window=3):
    """Why a run has collapsed, judged without labels from its metrics rows, or None.

    Compares means over the last and the first `window` steps. Collapsed is: length grown or shrunk
    `factor`-fold, entropy grown `factor`-fold, 30 points more responses truncated, or entropy
    under 1e-4 nats, where every response is the same. A factor of 0 turns it off.
    """
    rows = [row for row in rows if row["step"] > 0]
    if not factor or len(rows) < 2 * window:
        return None
    first, last = {}, {}
    for key in ("length", "entropy", "truncated"):
        first[key] = sum(row[key] for row in rows[:window]) / window
        last[key] = sum(row[key] for row in rows[-window:]) / window
    if not first["length"] / factor <= last["length"] <= first["length"] * factor:
        return f"responses went from {first['length']:.1f} to {last['length']:.1f} tokens"
    if not last["entropy"] <= first["entropy"] * factor:
        return f"entropy rose from {first['entropy']:.3g} to {last['entropy']:.3g} nats a token"
    if not last["truncated"] <= first["truncated"] + 0.3:
        return f"truncated responses rose from {first['truncated']:.0%} to {last['truncated']:.0%}"
    if last["entropy"] < 1e-4:
        return f"entropy is {last['entropy']:.1g} nats a token: every response is the same"
    return None
