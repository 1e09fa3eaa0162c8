"""
Types for argparse that check: a bad value is refused in one line, before anything is made.

    parser.add_argument("--lr", type=positive)    # --lr -1: not a number above 0
"""
import argparse
import os
import re

from tasks.errors import UserError


def positive_int(text):
    if not 1 <= int(text) < 2**31:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number above 0, or too large")
    return int(text)


def whole_number(text):
    return 0 if int(text) == 0 else positive_int(text)


def two_or_more(text):
    if positive_int(text) < 2:
        raise argparse.ArgumentTypeError(f"{text} is not 2 or more: a response needs a rival")
    return int(text)


def positive(text):
    if not 1e-30 < float(text) < 1e30:  # what float32 can hold, and its square roots
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0, from 1e-30 to 1e30")
    return float(text)


def fraction(text):
    if not 0 < float(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number between 0 and 1")
    return float(text)


def nonnegative(text):
    return 0.0 if float(text) == 0 else positive(text)


def number_or_exact(text):
    if text != "exact" and not -1e30 < float(text) < 1e30:
        raise argparse.ArgumentTypeError(f"{text} is neither a number nor the word exact")
    return text if text == "exact" else float(text)


def growth(text):
    if float(text) != 0 and not 1 < float(text) < 1e30:
        raise argparse.ArgumentTypeError(f"{text} is neither 0 nor a number above 1")
    return float(text)


def shard(text):
    """"2/8" -> (2, 8): the third of eight parts."""
    part, _, parts = text.partition("/")
    if not 0 <= int(part) < int(parts):
        raise argparse.ArgumentTypeError(f"{text} is not one of 0/N, 1/N, ... and (N - 1)/N")
    return int(part), int(parts)


def plain_text(text):
    """Text that a model can read. Bytes that are no characters of the terminal's encoding come
    as halves of surrogate pairs; in the C locale those of UTF-8 do."""
    refuse_blank(text)
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        try:
            return os.fsencode(text).decode()
        except UnicodeError:
            raise argparse.ArgumentTypeError(f"{text!r} is not text in UTF-8") from None


def path_name(text):
    """Of a file or folder that safetensors and tokenizers, too, can open: they want UTF-8."""
    refuse_blank(text)
    if any("\ud800" <= char <= "\udfff" for char in text):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no name in this terminal's encoding; set PYTHONUTF8=1, or rename it"
        )
    return text


def refuse_blank(text):
    """Of `--resume "$RUN"`, say, without a RUN: as if there were no flag a new run would begin."""
    if not text.strip():
        raise argparse.ArgumentTypeError(f"{text!r} is blank; give one, or leave the flag out")


def comma_list(text):
    """"a,b" -> its parts, each of which stands there once."""
    parts = text.split(",")
    for name in parts:
        refuse_blank(name)
        if parts.count(name) > 1:
            raise argparse.ArgumentTypeError(f"{name} stands there twice")
    return parts


def template_settings(text):
    """"enable_thinking=false,effort=low" -> its parts. A comma inside a value separates nothing."""
    parts = re.split(r",(?=\w+=)", text)
    for part in parts:
        key, found, _ = part.partition("=")
        if not key.isidentifier() or not found:
            raise argparse.ArgumentTypeError(f"{part} is not of the form enable_thinking=false")
    return parts


def as_flags(saved, defaults, path):
    """The settings that `path` has saved as a command line, so that argparse checks them as it
    checks one. `defaults` has a value for each setting that there is. Raises UserError where
    one is missing, unknown or null, as it may be when other code has written them."""
    for key in sorted(defaults.keys() ^ saved.keys()):
        found = "is not a setting of this version" if key in saved else "is missing"
        raise UserError(f"{path}: {key!r} {found}; the run can't go on as it began, so start again "
                        "with another --out")
    flags = []
    for key, value in saved.items():
        flag = "--" + key.replace("_", "-")
        if value is defaults[key] and not value:  # None or False: it was not given
            continue
        if value is None:
            raise UserError(f"{path}: {key!r} is null; it needs a value")
        if isinstance(value, bool):
            flags.append(flag if value else flag.replace("--", "--no-", 1))
        else:
            text = ",".join(map(str, value)) if isinstance(value, list) else value
            flags.append(f"{flag}={text}")
    return flags


class Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keeps the docstring's lines, and shows every default but None."""

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)
