"""What is loaded: damaged folders, dropout, and models that can't do what is asked."""
import inspect
import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import CONFIG_MAPPING

import em_rl
from engine import load
from engine.check import check_model, check_tokens, sampler_gap
from engine.load import load_model, set_up, switch_off_dropout
from engine.sampler import generate
from entropy import output_head
from tasks.errors import UserError
from tests.models import TINY_BASE, random_model, rows_of


def test_every_script_does_without_the_attention_that_plans_each_length_anew():
    """Guards against cuDNN's: 64 rows at 7B took 56 ms a token on an H200, and 28 without."""
    torch.backends.cuda.enable_cudnn_sdp(True)
    set_up("cpu")
    assert not torch.backends.cuda.cudnn_sdp_enabled()


# ------------------------------------------------------------------------------------- files


def cut(path):
    path.write_bytes(path.read_bytes()[:-9])


def change(**settings):
    return lambda path: path.write_text(json.dumps(json.loads(path.read_text()) | settings))


@pytest.mark.parametrize("file, spoil, words", [
    ("config.json", cut, "config.json: damaged"),
    ("generation_config.json", cut, "generation_config.json: damaged"),  # else it is ignored
    ("tokenizer.json", cut, "tokenizer.json: damaged"),
    ("tokenizer_config.json", cut, "tokenizer_config.json: damaged"),
    ("model.safetensors", cut, "model.safetensors: damaged"),
    ("config.json", os.remove, "its model can't be loaded|its tokenizer can't be loaded"),
    ("model.safetensors", os.remove, "its model can't be loaded.*model.safetensors"),
    ("config.json", lambda path: path.write_text("[]"), "its tokenizer can't be loaded|its model"),
    ("config.json", change(model_type="nonsense"), "can't be loaded.*nonsense"),
    ("config.json", change(num_hidden_layers=9), "of its weights are in none of its files"),
    ("config.json", change(hidden_size=60), "its model can't be loaded"),
])
def test_a_damaged_folder_is_one_line_that_names_the_file_and_keeps_the_cause(
    file, spoil, words, tmp_path
):
    shutil.copytree(TINY_BASE, tmp_path / "model")
    spoil(tmp_path / "model" / file)
    with pytest.raises(UserError, match=words) as error:
        load_model(str(tmp_path / "model"), "cpu")
    said = str(error.value)
    assert str(tmp_path / "model") in said and "\n" not in said
    assert error.value.__cause__ or "none of its files" in said


@pytest.mark.parametrize("line, broken", [
    ("AutoTokenizer.from_pretrained(source)", "AutoTokenizer.from_pretrained(suorce)"),
    ("model.to(device)", "model.too(device)"),
])
def test_a_line_that_a_reader_broke_shows_its_traceback(line, broken):
    source = inspect.getsource(load)
    assert source.count(line) == 1
    names = {"__file__": load.__file__, "__name__": "engine.load"}
    exec(compile(source.replace(line, broken), load.__file__, "exec"), names)
    with pytest.raises((NameError, AttributeError), match="suorce|too"):
        names["load_model"](TINY_BASE, "cpu")


@pytest.mark.parametrize("words, threads", [(None, 1), ("", 1), ("3", 3)])
def test_the_tiny_model_has_one_thread_unless_the_user_says_otherwise(words, threads, monkeypatch):
    """Guards against a run beside another job that takes many times as long."""
    before = torch.get_num_threads()
    if words is None:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    else:
        monkeypatch.setenv("OMP_NUM_THREADS", words)
    try:
        torch.set_num_threads(3)
        load_model(TINY_BASE, "cpu")
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


# ------------------------------------------------------------------------------------- noise

NOISY = [
    ("gpt2", {}), ("opt", {}), ("gpt_bigcode", {}), ("biogpt", {}),  # their configs' defaults
    ("granite", dict(attention_dropout=0.1)),
    ("opt", dict(dropout=0.0, layerdrop=0.5)),
    ("mixtral", dict(router_jitter_noise=0.1)),
]


@pytest.mark.parametrize("kind, settings", NOISY)
def test_on_policy_ratios_are_1_in_train_mode(kind, settings, capsys):
    """Guards against dropout in training: ratios were 0.03 to 2.8, and no check saw it."""
    model, prompts = random_model(kind, **settings).train(), rows_of(9, 4, 6)
    head, state = output_head(model.eval(), prompts[0]), torch.get_rng_state()
    assert sampler_gap(model, head, prompts, [], 8) > 1e-2
    with pytest.raises(UserError, match="differ by"):
        check_model(model, prompts, 8, training=True)
    check_model(model, prompts, 8)  # it can be evaluated
    switch_off_dropout(model)
    assert sampler_gap(model, head, prompts, [], 8) < 1e-5
    check_model(model, prompts, 8, training=True)
    assert capsys.readouterr().out.startswith("dropout: ")
    switch_off_dropout(model)
    assert not capsys.readouterr().out
    assert not model.training and torch.equal(state, torch.get_rng_state())


# ------------------------------------------------------------------------ what a model can't do


@pytest.mark.parametrize("kind, settings", [
    ("llama4_text", dict(num_local_experts=4, intermediate_size_mlp=64, moe_layers=[1])),
    ("minimax", dict(layer_types=["linear_attention", "full_attention"], num_local_experts=4)),
    ("electra", dict(embedding_size=32, is_decoder=True)),
    ("bert", {}),
    ("rembert", dict(is_decoder=True)),
    ("rwkv", dict(attention_hidden_size=32)),
    ("bart", dict(d_model=32, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=64,
                  is_decoder=True, is_encoder_decoder=False)),
    ("openai-gpt", {}),
    ("bloom", {}),
])
def test_a_class_of_model_that_is_not_supported_is_one_line_that_names_it(kind, settings):
    """Guards against tracebacks in the middle, and against RWKV and BART, which decoded wrong."""
    model = random_model(kind, **settings)
    with pytest.raises(UserError, match=f"{type(model).__name__}.*not supported") as error:
        check_model(model, rows_of(9, 12), 4)
    assert "\n" not in str(error.value)


def test_a_token_without_an_embedding_is_one_line():
    """Guards against an IndexError, and against the empty tokenizer of a folder without one."""
    with pytest.raises(UserError, match="token 280 is in a prompt.*only 280 embeddings"):
        check_tokens(random_model("qwen2"), [[1, 2], [3, 280]])
    with pytest.raises(UserError, match="no tokens.*tokenizer's files"):
        check_tokens(random_model("qwen2"), [[1, 2], []])


LONGER = dict(max_position_embeddings=64, original_max_position_embeddings=32)
LONG = dict(LONGER, rope_type="longrope", short_factor=[1.0] * 4, long_factor=[4.0] * 4)
DYNAMIC = dict(rope_type="dynamic", rope_theta=10000.0, factor=4.0)


@pytest.mark.parametrize("kind, settings", [
    ("gpt2", {}), ("gpt_bigcode", {}), ("opt", {}), ("biogpt", {}), ("gptj", dict(rotary_dim=4)),
    ("phi3", dict(LONGER, rope_parameters=LONG)),
    ("llama", dict(rope_parameters=DYNAMIC)),
])
def test_what_is_longer_than_the_model_allows_is_refused_and_nothing_shorter(
    kind, settings, capsys
):
    """Guards against an IndexError in the middle of a run, and against ropes that change for all
    rows of a batch as soon as one is long: sampler and scorer differed by nats."""
    model = random_model(kind, **{"max_position_embeddings": 32, **settings})
    switch_off_dropout(model)
    prompts = rows_of(26, 9)
    with pytest.raises(UserError, match="make 33,.*32 tokens.*--max-new-tokens.*--max-prompt"):
        check_model(model, prompts, 7)
    check_model(model, prompts, 6, training=True)
    rollout = generate(model, prompts, [], 6, N=2)
    assert rollout.mask.all() and "warning" not in capsys.readouterr().out


def test_other_ropes_go_on_with_a_warning(capsys):
    check_model(random_model("qwen3", max_position_embeddings=16), rows_of(26, 9), 7)
    assert "make 33, and the model was trained on at most 16" in capsys.readouterr().out
    check_model(random_model("mixtral", max_position_embeddings=33), rows_of(26, 9), 7)
    assert not capsys.readouterr().out


def test_a_large_model_on_a_cpu_gets_the_dtype_of_the_faster_products(monkeypatch, capsys):
    config = CONFIG_MAPPING["qwen2"](vocab_size=200_000, hidden_size=256)
    small = random_model("qwen2").config
    for seconds, chosen in ((1, torch.bfloat16), (3, torch.float32)):
        spent = {torch.float32: 2.0, torch.bfloat16: float(seconds)}
        monkeypatch.setattr(load, "seconds_of_product", spent.__getitem__)
        assert load.cpu_dtype(config) is chosen
        told = capsys.readouterr().out
        assert str(chosen).removeprefix("torch.") in told and f"{2 / seconds:.1f} times" in told
    assert load.cpu_dtype(small) is torch.float32 and not capsys.readouterr().out


def test_what_was_chosen_on_a_cpu_is_a_run_s_setting(tmp_path, monkeypatch):
    """Guards: a run that is resumed in another precision, where the products were timed anew."""
    monkeypatch.setattr(load, "cpu_dtype", lambda config: torch.bfloat16)
    flags = "--steps 1 --prompts 2 --max-new-tokens 4 --val none --device cpu --out"
    em_rl.main([*flags.split(), str(tmp_path / "run")])
    assert json.loads((tmp_path / "run/config.json").read_text())["dtype"] == "bfloat16"
    monkeypatch.setattr(load, "cpu_dtype", lambda config: torch.float32)
    em_rl.main(["--resume", str(tmp_path / "run"), "--steps", "2"])
    weights = load_file(tmp_path / "run/checkpoint/model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
