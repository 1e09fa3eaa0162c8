"""tiny/guard.py's rule and its hook, and tiny/variance.py."""
import json
import shutil
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import em_rl
from tests.models import ROOT
from training.run import read_rows, write_rows

sys.path.insert(0, str(ROOT / "tiny"))
import guard
import variance


def make_run(folder, greedy, **candidates):
    """Files of a run of 20 steps; the candidates that are not given stay as they are."""
    folder.mkdir()
    lines = [",".join(["step", *guard.CANDIDATES])]
    for i in range(20):
        cells = [i + 1]
        for name in guard.CANDIDATES:
            cells.append(candidates[name][i] if name in candidates else 1.0)
        lines.append(",".join(map(str, cells)))
    (folder / "candidates.csv").write_text("\n".join(lines) + "\n")
    rows = [{"step": step} for step in range(21)]
    for step, value in greedy.items():
        rows[step]["val_greedy"] = value
    write_rows(folder / "metrics.csv", rows)
    return guard.read_run(folder)


RISE_AND_FALL = {0: 0.5, 5: 0.6, 10: 0.7, 15: 0.4, 20: 0.3}


@pytest.mark.parametrize("threshold, stop, early, late", [
    (3.5, 5, 10, 0),  # the mean of 3, 4, 5 is 4; greedy is 60 %, and later 70 %
    (8.5, 10, 0, 0),
    (9.0, 11, 0, 0),  # 9 is not above 9; the last evaluation was at step 10
    (13.5, 15, 0, 30),
    (100, 21, 0, 40),  # never
])
def test_a_stop_counts_the_points_that_it_loses(tmp_path, threshold, stop, early, late):
    run = make_run(tmp_path / "run", RISE_AND_FALL, kl_response=range(1, 21))
    assert guard.stop_at(run, "kl_response", threshold) == stop
    assert run.early[stop] == pytest.approx(early) and run.late[stop] == pytest.approx(late)
    assert guard.judge([run, run], "kl_response", threshold) == (2 * (early > 2), 2 * (late >= 5))


def test_a_share_is_one_of_the_highest_or_of_the_first_steps_and_not_mixed_up(tmp_path):
    run = make_run(
        tmp_path / "run", RISE_AND_FALL,
        base_greedy=[0.2] + [0.4] * 5 + [0.1] * 14,  # means from step 6 on: 0.4, 0.3, 0.2, 0.1
        distinct=[0.5] * 3 + [1.0] * 3 + [0.5] * 3 + [0.2] * 11,  # from 9 on: 0.5 0.4 0.3 0.2
    )
    assert guard.stop_at(run, "base_greedy", -0.6) == 8
    assert guard.stop_at(run, "distinct", -0.7) == 11


def test_the_threshold_is_the_middle_one_of_those_without_early_and_with_fewest_late(tmp_path):
    run = make_run(tmp_path / "run", RISE_AND_FALL, kl_response=range(1, 21))
    # the signal is 2 at step 3, 3 at step 4 ...; above 8, 9, 10, 11, 12 it is at steps 10 to 14
    assert guard.choose([run], "kl_response") == 10
    # a second run that never falls and gains at its end must not be stopped before that
    rising = make_run(tmp_path / "other", {0: 0.5, 20: 0.9}, kl_response=range(1, 21))
    threshold = guard.choose([run, rising], "kl_response")
    assert guard.judge([run, rising], "kl_response", threshold) == (0, 1)


def test_a_report_names_no_guard_where_the_judging_half_is_stopped_early(tmp_path):
    runs = {}
    for name in "token-fast-base-1", "random-fast-half-2":  # they choose
        runs[name] = make_run(tmp_path / name, RISE_AND_FALL, agreement=range(1, 21))
    rising = {0: 0.5, 5: 0.5, 10: 0.5, 15: 0.5, 20: 0.9}
    runs["token-fast-base-2"] = make_run(tmp_path / "a", rising, agreement=range(1, 21))
    runs["token-fast-half-1"] = make_run(tmp_path / "b", RISE_AND_FALL, agreement=range(1, 21))
    text = guard.report(runs)
    assert "| agreement | above | 10 | 0 | 0 | 1 | 0 |" in text
    assert "| no guard | above | inf | 0 | 2 | 0 | 1 |" in text
    assert "`agreement`, stops 1 early and 0 late: it fails" in text
    del runs["token-fast-base-2"]
    assert "`agreement`, stops 0 early and 0 late: it becomes the guard" in guard.report(runs)


def test_the_hook_changes_nothing_and_measures_the_kl_to_the_model_that_the_run_began_with(
    tmp_path, monkeypatch
):
    """The KL of every run was once that to tiny/base, also where another model was trained."""
    half = tmp_path / "half"
    shutil.copytree(ROOT / "tiny/base", half)
    weights = load_file(half / "model.safetensors")
    for name in weights:
        weights[name] = weights[name] * 1.05
    save_file(weights, half / "model.safetensors", metadata={"format": "pt"})
    monkeypatch.setattr(guard, "STEPS", 2)
    monkeypatch.setattr(em_rl, "generate", em_rl.generate)  # put back in the end
    monkeypatch.setitem(em_rl.TINY, "model", str(half))
    flags = "--reward random --lr 1e-3 --guard 0 --steps 2 --val-size 256 --device cpu --out"
    em_rl.main([*flags.split(), str(tmp_path / "plain")])
    signals = guard.signals

    def signals_that_draw(*args):
        torch.rand(3)  # as a signal that samples would
        return signals(*args)

    monkeypatch.setattr(guard, "signals", signals_that_draw)
    guard.train(tmp_path / "random-fast-half-1")
    plain, watched = (read_rows(tmp_path / name / "metrics.csv")
                      for name in ("plain", "random-fast-half-1"))
    for row in plain + watched:
        row.pop("seconds", None)
    assert watched == plain
    rows = read_rows(tmp_path / "random-fast-half-1/candidates.csv")
    assert abs(rows[0]["kl_response"]) < 1e-4 < rows[1]["kl_response"]
    assert 0 < rows[0]["base_greedy"] <= rows[0]["agreement"] < 1
    assert rows[0]["dependence_token"] > 0


def test_the_variances_are_those_of_the_estimates(tmp_path, monkeypatch):
    drawn = []
    estimates = variance.estimates

    def noted(*args):
        drawn.append(estimates(*args))
        return drawn[-1]

    monkeypatch.setattr(variance, "estimates", noted)
    variance.main(["--norm", "sum", "--batches", "4", "--out", str(tmp_path / "out.json")])
    found = json.loads((tmp_path / "out.json").read_text())
    assert set(found) == {"sequence", "token", "entropy's own", "token + exact"}
    for name, numbers in found.items():
        gradients = np.stack([estimate[name].numpy() for estimate in drawn])
        expected = gradients.var(0, ddof=1).sum()
        assert numbers["variance"] == pytest.approx(expected)
        products = gradients @ gradients.T  # of different batches: unbiased by itself
        squared = (products.sum() - np.trace(products)) / 12
        assert numbers["squared mean"] == pytest.approx(squared)
