"""The scripts eval.py and em_inf.py."""
import errno
import json
import re
import shutil
from pathlib import Path

import filelock
import pytest
import torch

import em_inf
import eval as ev
from engine.files import fresh_folder, read_samples
from engine.sampler import generate
from entropy import output_head
from tasks.answers import votes
from tasks.problems import load_problems
from tests.models import ROOT, TINY_BASE

DATA = ROOT / "tiny/test.jsonl"


@pytest.mark.parametrize("decoder, drafts", [
    ("sample@0.1", [1]), ("self-consistency", [4]), ("em-inf+refine", [1, 1, 1]),
])
def test_decoders_spend_what_they_say(decoder, drafts, tiny, monkeypatch):
    model, tokenizer = tiny
    calls = []

    def record(model, prompts, *args, N=1, **settings):
        rollout = generate(model, prompts, *args, N=N, **settings)
        calls.append((N, prompts, rollout.responses))
        return rollout

    monkeypatch.setattr(em_inf, "generate", record)
    problems = [p for p in load_problems(DATA)[:3] for _ in range(2)]
    head, state = output_head(model, [1, 2]), torch.get_rng_state()
    samples = em_inf.decode_and_grade(model, tokenizer, head, problems, decoder, 24)
    tokens = sum(n * len(sum(p, [])) + len(sum(r, [])) for n, p, r in calls)
    assert [call[0] for call in calls] == drafts
    assert sum(s["flops"] for s in samples) == 2 * model.num_parameters() * tokens
    n, prompts, responses = calls[-1]
    texts = tokenizer.batch_decode(responses, skip_special_tokens=True)
    counts = votes(texts[:n])
    assert samples[0]["response"] == texts[counts.index(max(counts))]
    if n < len(calls):
        earlier = tokenizer.decode(calls[-2][2][0], skip_special_tokens=True)
        assert earlier in tokenizer.decode(prompts[0])
    if decoder == "sample@0.1":  # eval.py's from one prefill for two; scored at T = 1
        evaluated = ev.evaluate(model, tokenizer, head, problems[::2], 0.1, 24, n=2)
        for a, b in zip(samples, evaluated):
            assert a | {"seconds": 0} == b | {"seconds": 0}
        assert len(b) == 13 and all(key in ev.graded.__doc__ for key in b)
    assert torch.equal(state, torch.get_rng_state())


def test_decoder_names():
    assert em_inf.parse_decoder("em-inf+greedy", 0.8) == ("em-inf", "greedy", 0)
    assert em_inf.parse_decoder("em-inf", 0.8) == ("em-inf", "sample", 0.8)


SETTINGS = "--limit 9 --seeds 2 --n 2 --rollout-batch 8 --device cpu --out".split()


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    """A finished evaluation, in use, and other things."""
    room = tmp_path_factory.mktemp("room")
    ev.main(SETTINGS + [str(room / "whole")])
    (room / "empty").mkdir()
    (room / "run").mkdir()
    (room / "run/config.json").write_text('{"script": "em_rl.py"}')
    (room / "run/samples.jsonl").write_text('{"step": 1, "response": "a"}')
    shutil.copytree(TINY_BASE, room / "damaged")
    (room / "damaged/generation_config.json").write_text("{")  # it says how a response ends
    (room / "code.jsonl").write_text('{"prompt": "a", "tests": "assert f() == 1"}')
    with filelock.FileLock(room / "whole/lock"):
        yield room


def found(folder):
    """All that an evaluation says, but seconds."""
    text = json.dumps(read_samples(folder)) + (folder / "results.json").read_text()
    return re.sub(r'"seconds": [\d.e-]+', "", text)


def test_an_evaluation_goes_on_and_its_samples_give_the_table(room, tmp_path, monkeypatch, capsys):
    cut, evaluate, calls = tmp_path / "cut", ev.evaluate, []

    def interrupted(*args, **settings):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return evaluate(*args, **settings)

    monkeypatch.setattr(ev, "evaluate", interrupted)
    with pytest.raises(SystemExit, match=f"--resume {cut}"):
        ev.main(SETTINGS + [str(cut)])
    path = cut / "samples.jsonl"
    path.write_text(path.read_text()[:-30])  # killed while it wrote a line
    ev.main(["--resume", str(cut)])
    assert len(calls) == 4 + 8 - 2  # that with half a line again
    assert found(cut) == found(room / "whole") and (cut / "reliability.png").exists()
    table = capsys.readouterr().out
    path.write_text(path.read_text().replace('"correct": true', '"correct": false'))
    ev.main(["--regrade", str(cut)])
    assert capsys.readouterr().out.strip() in table


def test_shards_in_one_folder_give_the_table_of_one_process(room, tmp_path, capsys):
    shared = SETTINGS + [str(tmp_path / "shared"), "--shard"]
    ev.main(shared + ["0/2"])
    assert "19 of 45 samples" in capsys.readouterr().out
    first = tmp_path / "shared/samples-0.jsonl"
    first.write_text(first.read_text()[:-30])  # killed
    with pytest.raises(SystemExit, match="began with limit 9"):
        ev.main(shared + ["1/2", "--limit", "8"])
    ev.main(shared + ["1/2"])
    assert "1 of 45 samples" in capsys.readouterr().out
    ev.main(shared + ["0/2"])
    assert found(tmp_path / "shared") == found(room / "whole")
    ev.main(["--resume", str(tmp_path / "shared")])  # in one process there is nothing left to do
    assert len(list((tmp_path / "shared").glob("samples*"))) == 2


def test_data_of_one_stem_stay_apart_and_each_has_its_diagnosis(tmp_path, capsys):
    other = tmp_path / "test.jsonl"
    other.write_text(DATA.read_text().split("\n", 200)[200])
    argv = f"--diagnose --data {DATA},{other} --limit 150 --n 4 --out {tmp_path}/c --device cpu"
    ev.main(argv.split())
    said = capsys.readouterr().out
    first, second = re.findall(r"test.jsonl sample:\ngreedy ([\d.]+)%", said)
    assert first != second and said.count("likely helps") == 4


EVAL = """--limit 0
--n 0
--max-new-tokens 0
--decode foo: foo em_inf.py
--decode sample@0
--decode sample@nan
--decode greedy,greedy: greedy twice
--decode sample,sample@1.0: sample,sample@1.0 same
--device bogus
--model nowhere: nowhere
--model damaged: damaged
--data code.jsonl: code.jsonl --allow-code-execution
--out whole: whole --resume
--resume run: run em_rl.py
--resume whole: another process
--resume whole --limit 5: limit 9 5
--shard 2/2 --out new: 2/2
--diagnose --decode sample: --decode sample --diagnose
--shard 0/2: --out
--resume whole --n 3: n 2 3
--resume whole --model other: model other
--regrade nowhere: nowhere samples.jsonl
--compare whole run: run eval.py
--compare empty whole: empty samples.jsonl""".split("\n")
EM_INF = """--decode beam@1
--decode greedy,em-inf,greedy: greedy twice
--lr 1e30
--limit 1 --lr 1e20: nan lr
--delta 1e300
--kl-weight inf
--temperature 1e-300
--seeds -1""".split("\n")


@pytest.mark.parametrize("line", EVAL + EM_INF)
def test_bad_input_is_one_line_and_leaves_nothing(line, room, monkeypatch, capsys):
    monkeypatch.chdir(room)
    before = [*room.rglob("*")]
    argv, _, words = line.partition(": ")
    main = ev.main if line in EVAL else em_inf.main
    with pytest.raises(SystemExit) as error:
        main(argv.split())
    said = error.value.code
    if said == 2:  # argparse wrote it
        said = capsys.readouterr().err.strip().split("\n")[-1]
    assert "\n" not in said
    assert all(word in said for word in (words or line).split())
    assert before == [*room.rglob("*")]


def refused(argv, words, capsys):
    with pytest.raises(SystemExit) as error:
        ev.main([str(argument) for argument in argv])
    said = error.value.code
    if said == 2:  # argparse wrote it
        said = capsys.readouterr().err.strip().split("\n")[-1]
    assert "\n" not in said and all(word in said for word in words.split()), said


@pytest.fixture
def copy(room, tmp_path):
    """A copy of the finished evaluation, which nobody uses."""
    return shutil.copytree(room / "whole", tmp_path / "copy")


@pytest.mark.parametrize("edit, words", [
    ({"n": 0}, "config.json --n 0"),
    ({"decode": 5}, "--decode 5"),
    ({"max_new_tokens": None}, "config.json max_new_tokens null"),
    ({"max_new_tokens": ...}, "config.json max_new_tokens missing"),
    ({"batch": 5}, "config.json batch not a setting"),
    ({"model": None}, "config.json model null"),
    ({"diagnose": True}, "seeds 2 1"),  # which it asks for
    ({"inputs": ...}, "inputs"),
    ({"inputs": "x"}, "inputs"),
])
def test_saved_settings_are_checked_as_flags_are(edit, words, copy, capsys):
    config = json.loads((copy / "config.json").read_text()) | edit
    config = {key: config[key] for key in config if config[key] is not ...}
    (copy / "config.json").write_text(json.dumps(config))
    refused(["--resume", copy], words, capsys)


@pytest.mark.parametrize("field, value, words", [
    ("place", "first", "line 3 place first"),
    ("job", True, "line 3 job true"),
    ("entropy", "high", "line 3 entropy high"),
    ("length", None, "line 3 length null"),
    ("response", None, "line 3 response null"),
    ("correct", ..., "line 3 correct missing"),
    ("id", ["a"], "line 3 id"),
])
def test_a_line_that_is_not_eval_pys_own_is_named(field, value, words, copy, capsys):
    path = copy / "samples.jsonl"
    lines = path.read_text().splitlines()
    sample = json.loads(lines[2]) | {field: value}
    lines[2] = json.dumps({key: sample[key] for key in sample if sample[key] is not ...})
    path.write_text("\n".join(lines))
    for argv in ["--resume", copy], ["--regrade", copy], ["--compare", copy, copy]:
        refused(argv, f"samples.jsonl {words}", capsys)


def test_a_file_beside_the_samples_is_no_part_of_them(copy, room):
    """Guards against a copy, which would be mixed in, and a traceback where it is not JSON."""
    (copy / "samples-x.jsonl").write_text('{"place": 5}\n')
    text = (copy / "samples.jsonl").read_text()
    (copy / "samples copy.jsonl").write_text(text.replace('"correct": true', '"correct": false'))
    assert found(copy) == found(room / "whole")


@pytest.mark.parametrize("name", ["samples.jsonl", "samples-0.jsonl", "results.json", "notes.txt"])
def test_no_evaluation_writes_into_a_folder_that_has_files(name, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / name).write_text('{"prompt": "1+1", "answer": "2"}\n')
    before = (tmp_path / "mine" / name).read_bytes()
    refused(SETTINGS + [tmp_path / "mine"], f"mine {name}", capsys)
    refused(SETTINGS + [tmp_path / "mine" / name], "no folder", capsys)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == [name]
    assert (tmp_path / "mine" / name).read_bytes() == before


@pytest.mark.parametrize("what", ["model", "data", "less data"])
def test_an_evaluation_goes_on_only_with_what_it_began_with(what, tmp_path, monkeypatch, capsys):
    """Guards against samples of two models in one table, and "-6 of 24 samples are to come"."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(TINY_BASE, "model")
    lines = DATA.read_text().splitlines(keepends=True)
    Path("data.jsonl").write_text("".join(lines[:8]))
    ev.main("--model model --data data.jsonl --seeds 1 --device cpu --out run".split())
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    ev.main("--resume ../run".split())  # its places are absolute
    monkeypatch.chdir(tmp_path)
    if what == "model":
        path = Path("model/model.safetensors")
        path.write_bytes(path.read_bytes()[:-4000] + bytes(4000))
        refused(["--resume", "run"], f"run {tmp_path}/model sha256 new folder", capsys)
    else:
        Path("data.jsonl").write_text("".join(lines[8:16] if what == "data" else lines[:6]))
        refused(["--resume", "run"], f"run {tmp_path}/data.jsonl 8 problems new folder", capsys)


def test_shards_may_begin_at_the_same_time(tmp_path, monkeypatch):
    """Guards against a second shard that found no config.json at first, and then one."""
    shared, load = SETTINGS + [str(tmp_path / "new"), "--shard"], ev.load_model

    def slow(*args):
        monkeypatch.setattr(ev, "load_model", load)
        ev.main(shared + ["0/2"])
        return load(*args)

    monkeypatch.setattr(ev, "load_model", slow)
    ev.main(shared + ["1/2"])
    assert (tmp_path / "new/results.json").exists()


def test_two_evaluations_of_one_second_have_folders_of_their_own(tmp_path):
    folders = [fresh_folder(tmp_path / "eval") for _ in range(3)]
    assert len(set(folders)) == 3 and all(folder.is_dir() for folder in folders)


@pytest.mark.parametrize("write", ["append_jsonl", "replace_file"])
def test_a_full_disk_ends_in_one_line_and_loses_nothing(write, room, tmp_path, monkeypatch):
    real, calls = getattr(ev, write), []
    fails_at = 2 if write == "append_jsonl" else 1  # the second job's samples, or results.json

    def full(*args):
        calls.append(1)
        if len(calls) == fails_at:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(*args)

    monkeypatch.setattr(ev, write, full)
    with pytest.raises(SystemExit, match=r"^eval.py: .*No space left.*--resume FOLDER$"):
        ev.main(SETTINGS + [str(tmp_path / "full")])
    ev.main(["--resume", str(tmp_path / "full")])
    assert found(tmp_path / "full") == found(room / "whole")
