"""em_rl_fsdp.py on two processes (gloo) and on one, beside em_rl.py.

Run by torchrun, this file is the two processes: `together` has what they do. The tests look at
what they left, so that torch is loaded only once for all of it.
"""
import contextlib
import io
import json
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import em_ft
import em_rl
import eval
from engine import report, run
from engine.load import load_model
from engine.sampler import generate
from entropy import output_head, score
from scale import em_rl_fsdp, memory, shards
from tests.models import FEW, TINY_BASE, random_model, rows_of

FLAGS = (
    f"--device cpu --data {FEW} --data-size 64 --prompts 8 --val-size 3 --max-new-tokens 20 "
    "--steps 5 --eval-every 2 --save-every 2 --guard 0 --budget 300 --seed 2 "
)
OTHER = "--val none --lr 1e-4 --no-recompute --steps 2 "
SAME = {  # runs that em_rl.py and two processes do alike, with a seed for each prompt
    "token": "",
    "sequence": "--reward sequence --budget 2000 --grad-clip 0.01 --steps 2",  # one micro-batch
    "split": "--updates 2 --recompute --keep-best --steps 2",
    "tied": f"{OTHER} --model qwen3 --reward self-certainty",
    "untied": f"{OTHER} --model llama --entropy-coef exact",
}
EM_FT = "--beta 0.1 --steps 2"
DRAWN = "--data same.jsonl --val none"  # one prompt again and again, and true draws
OTHERWISE = "--sync-each --offload --steps 2"  # "token" again
BAD = "--prompts 7", "--updates 5", "--rollouts 1", "--data none.jsonl", "--resume nothing"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "3600"}


def generate_by_prompt(model, prompts, *args, generate=generate, **settings):
    """The sampler, with a seed for each prompt: what is drawn does not depend on where the
    other prompts are, as it does for the real one, which draws for many rows at once."""
    rollouts = []
    for prompt in prompts:
        torch.manual_seed(hash(tuple(prompt)) % 2**31)
        rollouts.append(generate(model, [prompt], *args, **settings))
    whole = rollouts[0]
    whole.responses = sum([rollout.responses for rollout in rollouts], [])
    for name in "entropy", "logprobs", "mean_logprobs", "mask":
        rows = [row for rollout in rollouts for row in getattr(rollout, name)]
        setattr(whole, name, torch.nn.utils.rnn.pad_sequence(rows, batch_first=True))
    return whole


@contextlib.contextmanager
def by_prompt():
    """In here both scripts and their evaluations use it, and no figure is drawn."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (eval, em_rl, em_ft, shards):
            patch.setattr(module, "generate", generate_by_prompt)
        patch.setattr(report, "plot", lambda *_: None)
        yield


def train(script, flags, out):
    script.main(f"{FLAGS} {flags} --out {out}".split())


# ------------------------------------------------------------------ what two processes do


def together():
    """All that the tests need of two processes, in the current folder."""
    rank, _ = shards.join_processes()
    report.plot = lambda *_: None
    with by_prompt():
        refused(rank)
        for name, flags in SAME.items():
            train(em_rl_fsdp, flags, f"two-{name}")
        train(em_rl_fsdp, f"--method ft {EM_FT}", "two-em-ft")
        train(em_rl_fsdp, OTHERWISE, "two-otherwise")
        train(em_rl_fsdp, "--steps 2", "two-then-one")
        em_rl_fsdp.main("--resume one-then-two --steps 4".split())
    train(em_rl_fsdp, f"{DRAWN} --steps 2", "drawn")
    train(em_rl_fsdp, f"{DRAWN} --steps 1", "resumed")
    em_rl_fsdp.main("--resume resumed --steps 2".split())
    found = {"moves": moves(), "gap": whole_gap(), "memory": held()}
    if rank == 0:
        Path("found.json").write_text(json.dumps(found))
    train(em_rl_fsdp, "--val none --steps 9000", "cut")  # until Ctrl-C


def refused(rank):
    """Bad input ends both processes; what each of them has said."""
    said = []
    for flags in BAD:
        printed = io.StringIO()
        with contextlib.redirect_stderr(printed):
            try:
                em_rl_fsdp.main(f"{'' if 'resume' in flags else FLAGS} {flags}".split())
            except SystemExit as end:
                if isinstance(end.code, str):
                    print(end.code, file=sys.stderr)
        said.append(printed.getvalue())
    Path(f"said-{rank}.json").write_text(json.dumps(said))


def sharded(kind, dtype=torch.float32, work=None):
    """(a random model, the same spread over the processes, its head, the number of them)."""
    _, world = shards.join_processes()
    whole = random_model(kind)
    head = output_head(whole, list(range(20))) | {"weight": None, "bias": None}
    own = whole if dist.get_rank() == 0 else None
    model = shards.spread(own, "cpu", dtype, work=work)
    return whole, model, head, world


def moves():
    """How ten steps at a learning rate of 1e-6 move the weights, in both precisions: the shares
    that move, the ratio of the moves' lengths, and their cosine."""
    moved = []
    for work in (torch.float32, torch.bfloat16):
        whole, model, head, _ = sharded("qwen2", work=work)
        start = [p.clone() for p in whole.parameters()]
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
        for i in range(10):
            batch = rows_of(5, 7, seed=i), rows_of(9, 4, seed=10 + i)
            entropy, logprobs, mask = model.score(head, *batch, 1.0)
            (logprobs * mask).mean().backward()
            shards.clip(optimizer, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        assert all(p.dtype == torch.float32 for p in model.parameters())
        shards.collect(model, whole)
        change = [(p - q).flatten() for p, q in zip(whole.parameters(), start)]
        moved.append(torch.cat(change).detach())
    full, half = moved
    return {
        "shares": [(move != 0).float().mean().item() for move in moved],
        "length": (half.norm() / full.norm()).item(),
        "cosine": torch.cosine_similarity(half, full, dim=0).item(),
    }


@torch.no_grad()
def whole_gap():
    """The largest difference between a model's numbers and those of its two halves, in the
    forward of FSDP and gathered, where each process may run it as often as it likes."""
    rank, worst = dist.get_rank(), 0.0
    batch = rows_of(5, 7), rows_of(9, 4, seed=1)
    for kind in ("gemma2", "llama", "gpt2"):
        whole, model, head, _ = sharded(kind)
        expected = score(whole, shards.head_of(whole, head), *batch)
        results = [model.score(head, *batch)]
        with shards.gathered(model):
            for _ in range(1 + 2 * rank):
                results.append(score(model, shards.head_of(model, head), *batch))
        results.append(model.score(head, *batch))
        for result in results:
            worst = max(worst, (result[1] - expected[1]).abs().max().item())
    return worst


def held():
    """(bytes of float32 shards by arithmetic, bytes that there are) of the first process."""
    pairs = []
    for kind in ("qwen3", "llama", "gpt2"):
        whole, model, _, world = sharded(kind)
        sizes = [4 * p.to_local().numel() for p in model.parameters()]
        pairs.append([memory.memory_of(whole, world, 2)["masters"], sum(sizes)])
    return pairs


# ------------------------------------------------------------------------------- the tests


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with the runs of em_rl.py, of em_rl_fsdp.py on one process, and of both."""
    if not hasattr(os, "fork"):
        pytest.skip("Ctrl-C, which ends the two processes, needs Linux or macOS")
    folder = tmp_path_factory.mktemp("scale")
    before = os.getcwd()
    os.chdir(folder)
    for kind, tied in ("qwen3", True), ("llama", False):
        random_model(kind, tie_word_embeddings=tied).save_pretrained(kind)
        AutoTokenizer.from_pretrained(TINY_BASE).save_pretrained(kind)
    Path("same.jsonl").write_text(8 * '{"prompt": "Mod 10, left to right: 6-3-7*4+4"}\n')
    with by_prompt():
        train(em_rl_fsdp, "--steps 2", "one-then-two")
    with subprocess.Popen(
        [*TORCHRUN, __file__], env=ENVIRONMENT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    ) as both:
        said = ""
        try:
            with by_prompt():
                for name, flags in SAME.items():
                    train(em_rl, flags, f"one-{name}")
                train(em_ft, EM_FT.replace("2", "3"), "one-em-ft")
            while "step 6 |" not in said:  # of "cut", as all others end before
                said += both.stdout.readline()
                assert both.poll() is None, said[-9000:]
        finally:
            both.send_signal(signal.SIGINT)
            Path("said.txt").write_text(said + both.communicate()[0])
    with by_prompt():
        em_rl_fsdp.main("--resume two-then-one --steps 4".split())
        em_rl_fsdp.main("--resume two-em-ft --steps 3".split())
    yield folder
    os.chdir(before)


def metrics(folder):
    rows = run.read_rows(Path(folder, "metrics.csv"))
    return [row | {"seconds": 0} for row in rows]


def equal_metrics(folder, other, steps):
    """The same rows, but for rounding: 1e-4 of a number, and a KL that is 0 but for it."""
    rows, others = metrics(folder), metrics(other)[: steps + 1]
    assert len(rows) == len(others) == steps + 1
    for row, same in zip(rows, others):
        assert row == pytest.approx(same, rel=1e-4, abs=1e-7), (folder, row["step"])


@pytest.mark.parametrize("name", SAME)
def test_two_processes_give_the_metrics_of_em_rl(runs, name):
    """A normaliser of one process only, a mean of means, a norm over one's own shards, a
    gradient averaged where it must be summed: each would show. Micro-batches are of unequal
    number, but for "sequence"."""
    steps = 5 if name == "token" else 2
    equal_metrics(runs / f"two-{name}", runs / f"one-{name}", steps)
    best = [(runs / f"{first}-{name}/best").exists() for first in ("one", "two")]
    assert best == [name == "split"] * 2


def test_two_processes_give_the_metrics_of_em_ft(runs):
    """EM-FT is a reward of nothing and an entropy of weight -1: a KL or a reward that stays on,
    four responses in place of one, or a sign would show. The third step is of a resumed run: guards
    against a config.json whose one response a prompt was refused as too few for EM-RL."""
    equal_metrics(runs / "two-em-ft", runs / "one-em-ft", 3)
    assert json.loads((runs / "two-em-ft/config.json").read_text())["dtype"] == "float32"


def test_syncing_each_micro_batch_and_offloading_change_no_number(runs):
    equal_metrics(runs / "two-otherwise", runs / "two-token", 2)


@pytest.mark.parametrize("name", ["one-then-two", "two-then-one"])
def test_a_run_goes_on_with_another_number_of_processes(runs, name):
    """Adam's moments that are lost, or cut anew in another order, would show in a step."""
    equal_metrics(runs / name, runs / "one-token", 4)
    assert [path.name for path in (runs / name).glob("sharded-*")] == ["sharded-4"]


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(runs):
    assert metrics(runs / "drawn") == metrics(runs / "resumed")
    for name in ("drawn", "resumed"):
        dcp_to_torch_save(runs / name / "sharded-2", runs / f"{name}.pt")
    drawn, resumed = torch.load(runs / "drawn.pt"), torch.load(runs / "resumed.pt")
    for kept, other in (drawn["model"], resumed["model"]), flat(drawn, resumed):
        assert kept.keys() == other.keys() and len(kept) > 10
        assert all(torch.equal(kept[key], other[key]) for key in kept)


def flat(*states):
    """Adam's moments of each, as a dict by weight and name."""
    flattened = []
    for state in states:
        moments = {}
        for weight, values in state["optimizer"]["state"].items():
            for key, value in values.items():
                moments[weight, key] = value
        flattened.append(moments)
    return flattened


def test_processes_draw_different_samples_and_the_first_draws_as_one_alone(runs):
    """With one seed for all processes half of the rollouts would be the other half again."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "plot", lambda *_: None)
        train(em_rl, f"{DRAWN} --steps 1 --prompts 4", "alone-em-rl")
        train(em_rl_fsdp, f"{DRAWN} --steps 1 --prompts 4", "alone")
    equal_metrics("alone", "alone-em-rl", 1)
    assert metrics(runs / "drawn")[1]["tokens"] != 2 * metrics("alone")[1]["tokens"]


def test_the_checkpoint_is_an_ordinary_folder_with_the_masters_in_it(runs):
    model, _ = load_model(str(runs / "two-tied/checkpoint"), "cpu")
    dcp_to_torch_save(runs / "two-tied/sharded-2", runs / "tied.pt")
    masters = torch.load(runs / "tied.pt")["model"]
    assert all(torch.equal(p, masters[name]) for name, p in model.named_parameters())
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


def test_bf16_work_on_float32_shards_moves_as_float32_does_at_lr_1e_6(runs):
    """Weights that are bfloat16 themselves stand still there. (The embeddings of tokens that
    are in no batch do so in any precision.)"""
    found = json.loads((runs / "found.json").read_text())["moves"]
    full, half = found["shares"]
    assert half > 0.8 and half == pytest.approx(full, rel=0.02) and found["cosine"] > 0.9
    assert found["length"] == pytest.approx(1, rel=0.05)


def test_a_sharded_model_scores_as_the_whole_one_at_any_pace(runs):
    assert json.loads((runs / "found.json").read_text())["gap"] < 1e-5


def test_the_memory_that_is_announced_is_that_of_the_shards(runs):
    for computed, real in json.loads((runs / "found.json").read_text())["memory"]:
        assert computed == real


def test_bad_input_is_said_once_and_ends_every_process(runs):
    first, second = (json.loads((runs / f"said-{rank}.json").read_text()) for rank in (0, 1))
    for said, words in zip(first, BAD, strict=True):
        assert words.split()[1] in said.strip().split("\n")[-1] and "Traceback" not in said
    assert set(second) == {""}


def test_ctrl_c_to_torchrun_saves(runs):
    """torchrun passes the signal on once, and the processes see it in different steps: if they
    did not agree, one would wait for ever in a step that the other does not do."""
    said = (runs / "said.txt").read_text()
    step = int(re.search(r"stopped after step (\d+); to go on: --resume cut", said)[1])
    assert torch.load(runs / "cut/checkpoint/state.pt")["step"] == step
    assert len(metrics(runs / "cut")) == step + 1 and "SIGKILL" not in said
    assert (runs / f"cut/sharded-{step}/.metadata").exists()


@pytest.mark.parametrize("billions, layers, settings", [
    (7.62, 28, dict(hidden_size=3584, intermediate_size=18944, num_attention_heads=28)),
    (32.76, 64, dict(hidden_size=5120, intermediate_size=27648, num_attention_heads=40)),
])
def test_the_plan_needs_a_config_only(billions, layers, settings, tmp_path, capsys):
    config = AutoConfig.for_model(
        "qwen2", vocab_size=152_064, num_hidden_layers=layers, num_key_value_heads=4, **settings
    )
    config.save_pretrained(tmp_path)
    with pytest.raises(SystemExit) as end:
        em_rl_fsdp.main(f"--model {tmp_path} --plan 8".split())
    said = capsys.readouterr().out
    assert not end.value.code and "each of 8 processes" in said
    masters = float(re.search(r"masters ([\d.]+) GB", said)[1])
    assert masters == pytest.approx(billions * 4 / 8, rel=0.02)
    assert ("CPU memory" in said) == (billions > 20)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert memory.memory_of(model, 1, 2)["masters"] == 4 * model.num_parameters()


def test_the_plan_counts_vllm_s_share_of_the_gpu():
    """vLLM starts, and would have no room later for its weights beside the shards."""
    need = dict.fromkeys(
        ["masters", "gradients", "Adam", "reference", "layers", "layer gradients", "whole"], 10
    ) | {"whole gradients": 1}
    args = SimpleNamespace(beta=0, offload=None, sync_each=None, sampler="own", vllm_memory=0.7)
    assert memory.plan(need, 100, args) == (False, False, 30, 51)
    assert "vLLM" not in memory.describe(need, 2, 100, args)
    args.sampler = "vllm"
    assert memory.plan(need, 100, args) == (True, False, 70, 21)
    args.offload = False
    assert memory.plan(need, 100, args)[2] == 90
    assert "vLLM" in memory.describe(need, 2, 100, args)
    assert memory.plan(need, math.inf, args)[2] == 30  # on a CPU it has no share


def test_vllm_that_is_missing_is_said_in_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(SystemExit) as end:
        em_rl_fsdp.main(["--sampler", "vllm"])
    said = "em_rl_fsdp.py: --sampler vllm: needs a package; pip install vllm"
    assert end.value.code == said


if __name__ == "__main__":
    shards.run_and_end(together)
