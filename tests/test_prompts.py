"""Prompts: chat templates of every kind, and what ends a response."""
import pytest
from transformers import AddedToken

from engine.load import load_model
from tasks.errors import UserError
from tasks.prompts import SYSTEM, encode_prompt, response_texts, set_template, stop_ids
from tests.models import TINY_BASE, random_model

TURNS = "{% for m in messages %}[{{m.role}}]{{m.content}}<|end|>{% endfor %}"
NO_SYSTEM = "{{ raise_exception('WORDS') if messages[0].role == 'system' }}"
ALTERNATE = (  # Mistral 7B Instruct v0.2
    "{{ bos_token }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/...') }}{% endif %}"
    "[{{m.role}}]{{m.content}}<|end|>{% endfor %}"
)
ONLY = (  # Mixtral 8x7B Instruct
    "{% for m in messages %}{% if m.role in ['user', 'assistant'] %}"
    "[{{m.role}}]{{m.content}}<|end|>{% else %}"
    "{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
SILENT = (  # Phi-3 of April 2024 and OLMo 7B Instruct: no system turn, and no word about it
    "{% for m in messages %}{% if m.role == 'user' %}[user]{{m.content}}<|end|>"
    "{% elif m.role == 'assistant' %}{{m.content}}<|end|>{% endif %}{% endfor %}"
)
OWN_TURN = f"[system]{SYSTEM}<|end|>[user]Q?<|end|>"
ONE_TURN = f"[user]{SYSTEM}\n\nQ?<|end|>"


@pytest.fixture
def tokenizer():
    """The tiny model's, with a token <|end|> that is special, but on no list of such tokens."""
    tokenizer = load_model(TINY_BASE, "cpu")[1]
    tokenizer.add_tokens([AddedToken("<|end|>", special=True)])
    assert 280 not in tokenizer.all_special_ids
    return tokenizer


@pytest.mark.parametrize("template, text, stop", [
    (None, "Q?\n", [279]),
    ("", "Q?\n", [279]),
    (TURNS, OWN_TURN, [280, 279]),
    (NO_SYSTEM.replace("WORDS", "System role not supported") + TURNS, ONE_TURN, [280, 279]),
    (ALTERNATE, ONE_TURN, [280, 279]),
    (ONLY, ONE_TURN, [280, 279]),
    (SILENT, ONE_TURN, [280, 279]),
    ({"default": TURNS, "tool_use": ONLY}, OWN_TURN, [280, 279]),
    (TURNS.replace("<|end|>", "\n<|end|>\n"), OWN_TURN.replace("<|end|>", "\n<|end|>\n"),
     [280, 279]),  # DeepSeek Coder
    (TURNS.replace("<|end|>", "\n\n"), OWN_TURN.replace("<|end|>", "\n\n"), [279]),
    ("{% for m in messages if m.role == 'user' %}[user]{{m.content}}<|end|>{% endfor %}",
     ONE_TURN, [279]),  # no turn of the assistant's: what the text begins with ends nothing
])
def test_a_prompt_is_in_its_template_and_a_turn_ends_with_its_token(
    template, text, stop, tokenizer, tiny
):
    """Guards: a system prompt that is lost or ends in a traceback; a response that runs past its
    turn, since the token that ends it is on no list."""
    tokenizer.chat_template = template
    assert tokenizer.decode(encode_prompt(tokenizer, "Q?")) == text
    assert stop_ids(tiny[0], tokenizer) == stop


def test_an_eos_that_is_no_number_is_one_line(tiny):
    model = random_model("qwen2")
    model.generation_config.eos_token_id = ["<|end|>"]
    with pytest.raises(UserError, match="'<.end.>' in its generation_config.json"):
        stop_ids(model, tiny[1])


def test_a_plain_prompt_does_not_end_with_eos(tokenizer, monkeypatch):
    ids = encode_prompt(tokenizer, "Q?")
    monkeypatch.setattr(type(tokenizer), "__call__", lambda self, text: {"input_ids": ids + [279]})
    assert encode_prompt(tokenizer, "Q?") == ids


@pytest.mark.parametrize("template, words", [
    ("{% for m in messages %}", "TemplateSyntaxError"),
    ("{{ raise_exception('never') }}", "never"),
    ("{{ messages[0].content + 1 }}", "TypeError"),
    ("{% for i in range(10 ** 10) %}{{ i }}{% endfor %}", "OverflowError"),
    ("{{ messages.no.such }}", "UndefinedError"),
    ("nothing", "leaves the prompt out"),
    ({"tool_use": TURNS}, "multiple chat templates"),
    (7, "Error"),
])
def test_a_template_that_cannot_be_used_is_one_line_that_names_it(template, words, tokenizer):
    tokenizer.chat_template = template
    with pytest.raises(UserError, match=words) as error:
        encode_prompt(tokenizer, "Q?")
    assert tokenizer.name_or_path in str(error.value) and "\n" not in str(error.value)


THINKS = (  # Qwen3, in short; a macro and a loop see what is set, too
    "{% macro write(m) %}[{{m.role}}]{{ '/no' if depth == 2 }}{{m.content}}<|end|>{% endmacro %}"
    "{% for m in messages %}{{ write(m) }}{% endfor %}{% if add_generation_prompt %}[assistant]"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n"
    "{% elif open is defined %}<think>\n{% endif %}{% endif %}"
)


def test_settings_of_the_template_hold_wherever_it_is_used_and_in_a_checkpoint(
    tokenizer, tiny, tmp_path
):
    tokenizer.chat_template = THINKS
    tiny[0].save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    _, tokenizer = load_model(tmp_path, "cpu", template=["enable_thinking=false", "depth=2"])
    closed = f"[system]/no{SYSTEM}<|end|>[user]/noQ?<|end|>[assistant]<think>\n\n</think>\n\n"
    assert tokenizer.decode(encode_prompt(tokenizer, "Q?")) == closed
    assert stop_ids(tiny[0], tokenizer) == [280, 279]
    tokenizer.save_pretrained(tmp_path)
    for settings, end in ((), "</think>\n\n"), (["enable_thinking=true"], "[assistant]"):
        _, again = load_model(tmp_path, "cpu", template=settings)  # what is set last holds
        assert tokenizer.decode(encode_prompt(again, "Q?")).endswith(end)
    with pytest.raises(UserError, match="enable_thinkin=.*for enable_thinking, open"):
        set_template(tokenizer, ["enable_thinkin=false"])
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="a=1.*none"):
        set_template(tokenizer, ["a=1"])


def test_a_thought_that_the_prompt_opens_stands_before_the_response(tokenizer):
    """Guards against an answer in a thought that was cut: nothing in the response marks it."""
    tokenizer.add_tokens([AddedToken(mark, special=True) for mark in ("[THINK]", "[/THINK]")])
    responses = [tokenizer("7 or 8[/THINK]8<|end|>")["input_ids"]]
    tokenizer.chat_template = THINKS
    assert response_texts(tokenizer, responses) == ["7 or 8[/THINK]8"]
    set_template(tokenizer, ["open=1"])
    assert response_texts(tokenizer, responses) == ["<think>\n7 or 8[/THINK]8"]
    set_template(tokenizer, ["enable_thinking=false"])
    assert response_texts(tokenizer, responses) == ["7 or 8[/THINK]8"]
