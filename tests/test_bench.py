"""bench/gpu.py: every part at toy size, the arithmetic of its numbers, and parts that fail."""
import json
from unittest.mock import create_autospec

import pytest

import em_rl
from bench import gpu
from engine import cache, run, sampler
from tests.models import ROOT

OPTIONAL = {"lora": "peft", "vllm": "vllm"}  # the package that a part needs
PEAK = "entropy", "em_rl", "em_ft", "lora"  # they measure memory, by a module of POSIX


@pytest.fixture
def clocks_end(monkeypatch):
    """A part puts clocks on functions and never takes them off, since its process ends."""
    owners = [(run, "save_model"), (em_rl.MasterAdamW, "step")]
    owners += [(em_rl.MasterAdamW, "clip")]
    owners += [(sampler, "generate"), (sampler, "prefill"), (cache, "use_graphs")]
    for script in em_rl, gpu.em_ft:
        owners += [(script, "generate"), (script, "score_all")]
    for owner, name in owners:
        monkeypatch.setattr(owner, name, getattr(owner, name))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpu")
    result = gpu.weights(gpu.DRY, folder)
    # embedding and head, and in each of 2 layers: q and o, k and v, three of the MLP, the
    # biases of q, k and v, and two norms; the last norm
    layer = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 64 + 64 + 2 * 32 + 2 * 64
    assert result["summary"] == f"{2 * 512 * 64 + 2 * layer + 64:,} parameters"
    return folder


@pytest.mark.parametrize("name", [name for name in gpu.PARTS if name != "weights"])
def test_every_part_runs_at_toy_size(name, folder, clocks_end):
    """A part that nobody can run without a GPU rots unseen."""
    pytest.importorskip(OPTIONAL.get(name, "torch"), reason="the part's package is not installed")
    if name in PEAK:
        pytest.importorskip("resource", reason="needs Linux or macOS")
    sizes, before = gpu.DRY, set(folder.rglob("state.pt"))
    got = gpu.PARTS[name][0](sizes, folder)
    assert got["summary"] and "\n" not in got["summary"] and "|" not in got["summary"]
    json.dumps(got)
    if name == "entropy":  # a product of N x D and D x V takes 2 N D V; there are four
        assert got["speed"] * got["seconds"] == pytest.approx(4 * 2 * 64 * 512 * 64)
    if name == "em_inf":
        assert got["changed"] == 1 and 0 < got["sharpening"] < got["decoding"]
    if name == "sampler":
        assert got["same"] == 1
    if name in ("sampler", "compiled", "vllm"):
        assert all(got[key] > 0 for key in got if key != "summary")
    if name == "tiny":  # twice the same, as both are the CPU here
        first, second = got["runs"]
        assert first["step"] == 2
        assert first["val_greedy"] == second["val_greedy"]
        assert first["entropy"] == second["entropy"]
    if name in ("em_rl", "em_ft", "lora"):
        check_training_step(name, got)
        assert set(folder.rglob("state.pt")) == before  # a 7B model's has 107 GB


def test_the_part_of_vllm_calls_it_by_names_that_there_are(folder, monkeypatch):
    """Without the package the part is not run: guards against a setting that was renamed."""
    for name in "start", "load", "sample":
        function = getattr(gpu.vllm_rollouts, name)
        monkeypatch.setattr(gpu.vllm_rollouts, name, create_autospec(function))
    assert set(gpu.vllm(gpu.DRY, folder)) == {"vLLM at 4 rows", "vLLM at 8 rows", "summary"}


def check_training_step(name, got):
    """Phases that overlap, a step that is not the last, or a count of the wrong paper's run."""
    phases = [got["sampling"], got["reference"], got["update"], got["optimiser"]]
    assert sum(phases) == pytest.approx(got["seconds"])
    assert min(got["sampling"], got["update"], got["optimiser"]) > 0
    assert (got["reference"] > 0) == (name != "em_ft")
    assert got["step"] == (1 if name == "em_ft" else 2)
    assert got["length"] <= 8 and got["tokens"] == got["length"] * 8
    steps, responses = (40, 512) if name == "em_ft" else (100, 2048)
    tokens = responses * 1024 / got["tokens"]  # as many times the tokens of this step
    paper = sum(phases[:3]) * tokens + got["optimiser"]
    assert got["hours"] == pytest.approx(steps * paper / 3600)
    assert got["gigabytes"] > 0.1


FAIL = """
import sys
sys.path.insert(0, sys.argv[1])
from bench import gpu
gpu.FROM_FOLDER = set()  # so that em_ft finds no model
gpu.main(["--dry", "--only", "em_ft,em_inf", "--out", "gpu.json"])
"""


@pytest.mark.beside(command=lambda _: ["-c", FAIL, ROOT])
def test_a_part_that_fails_leaves_the_others(done):
    """Out of memory in one part must not cost the results of those behind it."""
    assert done.returncode == 0, done.stderr
    results = json.loads((done.folder / "gpu.json").read_text(encoding="utf-8"))
    assert list(results) == ["em_inf", "em_ft"]
    assert results["em_inf"]["changed"] == 1 and results["em_inf"]["part_seconds"] > 0
    failed = results["em_ft"]["failed"]
    assert failed.startswith("exit code 1: em_ft.py: model ") and "\n" not in failed
    assert failed.partition(": ")[2] in results["em_ft"]["log"]
    assert done.stdout.startswith("em_inf, ") and "\nem_ft, " in done.stdout
    assert "| `python bench/gpu.py --only em_ft` | failed: exit code 1" in done.stdout
    assert "on the CPU, at toy size" in done.stdout


def test_a_part_that_hangs_is_stopped_at_its_limit(tmp_path):
    got = gpu.run_part("entropy", tmp_path, dry=True, limit=0.2)
    assert got["failed"] == "stopped after 0 s: it wrote nothing"


def test_no_part_starts_when_the_minutes_are_over(tmp_path, capsys):
    out = tmp_path / "gpu.json"
    gpu.main(["--dry", "--minutes", "1e-9", "--out", str(out)])
    results = json.loads(out.read_text())
    assert list(results) == list(gpu.PARTS)
    assert all("were over before it" in result["failed"] for result in results.values())
    assert "were over" in capsys.readouterr().out


@pytest.mark.parametrize("flags, message", [
    (["--only", "entropy,sleep"], "--only sleep: the parts are sampler, em_inf, "),
    (["--minutes", "-1"], "-1 is not a number above 0"),
    ([], "no CUDA device here; --dry runs every part on the CPU"),
    (["--dry", "--out", "no/such/file.json"], "--out no/such/file.json: give a file, in a folder"),
    (["--dry", "--out", "."], "--out .: give a file, in a folder"),
])
def test_bad_settings_end_in_one_line_before_any_part(flags, message, capsys, monkeypatch):
    monkeypatch.setattr(gpu.torch.cuda, "is_available", bool)  # False
    with pytest.raises(SystemExit) as stop:
        gpu.main(flags)
    assert stop.value.code not in (0, None)
    assert message in capsys.readouterr().err + str(stop.value.code)


def test_the_table_of_toy_sizes_has_the_rows_of_the_real_one():
    """A size that one table lacks would fail on the GPU alone, where it costs money."""
    assert gpu.SIZES.keys() == gpu.DRY.keys()
    assert gpu.SIZES["model"].keys() == gpu.DRY["model"].keys()
