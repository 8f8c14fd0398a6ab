"""Prompt sources and the stateless shuffled sequence of prompts."""

import re
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alignprop.prompts import Prompts, batch, load_prompts

LETTERS = list("abcdefg")


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write a file into the working directory, which is a fresh folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", list(sys.path))
    return lambda name, text: Path(name).write_text(text, encoding="utf-8")


def test_animals_are_those_of_the_papers_with_others_held_out():
    prompts = load_prompts("animals")
    assert (len(prompts.train), len(prompts.unseen)) == (45, 8)
    assert prompts.train[0] == "a cat"
    assert "an octopus" in prompts.unseen


def test_unseen_prompts_replace_the_held_out_part():
    prompts = load_prompts("animals", unseen="drift")
    assert prompts.unseen == ("a red car", "a hamburger", "a green apple", "a rocket")


def test_text_file_skips_comments_and_blank_lines(write):
    write("mine.txt", "# heading\na café\n\n   \n  a red #1 ball  \n")
    assert load_prompts("mine.txt") == Prompts(("a café", "a red #1 ball"))
    assert load_prompts(Path("mine.txt"), unseen=["a fox"]).unseen == ("a fox",)


def test_jsonl_file_gives_the_field_prompt(write):
    write("mine.jsonl", '{"prompt": "a cat", "id": 7}\n\n{"prompt": "a dog"}\n')
    assert load_prompts("mine.jsonl").train == ("a cat", "a dog")


def test_functions_and_lists(write):
    write("my_prompts.py", "def pets():\n    return ['a cat', 'a dog']\n")
    expected = Prompts(("a cat", "a dog"))
    assert load_prompts("my_prompts:pets") == load_prompts(lambda: ["a cat", "a dog"]) == expected
    assert load_prompts(["a cat", "a dog"]) == expected


@pytest.mark.parametrize(
    "source, unseen, message",
    [
        ("missing.txt", None, "missing.txt' cannot be read: No such file or directory"),
        ("empty.txt", None, "empty.txt' holds no prompt"),
        ("animals", "empty.txt", "empty.txt' holds no prompt"),
        ("bad.jsonl", None, "bad.jsonl', line 3: no JSON"),
        ("fields.jsonl", None, "fields.jsonl', line 2: needs"),
        ("animlas", None, "did you mean 'animals'?"),
        ("xyz", None, "the lists are animals, drift"),
        ("no_such_module:f", None, "cannot be imported"),
        ("json:no_such_function", None, "json has no 'no_such_function'"),
        ([], None, "empty"),
        (["a cat", " "], None, "hold ' '"),
        (["a cat", 3], None, "hold 3"),
        (["a cat", "a dog"], ["a fox", "a dog"], "both in training and unseen: a dog"),
        ("drift", "drift", "a green apple, a hamburger"),
    ],
)
def test_bad_sources_are_refused_by_name(write, source, unseen, message):
    write("empty.txt", "# nothing\n")
    write("bad.jsonl", '{"prompt": "a cat"}\n\nnot json\n')
    write("fields.jsonl", '{"prompt": "a cat"}\n{"text": "a dog"}\n')
    with pytest.raises(ValueError, match=re.escape(message)):
        load_prompts(source, unseen)


@given(st.integers(0, 100), st.integers(0, 5))
def test_each_epoch_holds_every_prompt_once(seed, epoch):
    assert sorted(batch(LETTERS, seed, 7 * epoch, 7)) == LETTERS


@given(st.integers(0, 60), st.integers(0, 30), st.integers(0, 30))
def test_any_cut_gives_the_same_sequence(position, first, second):
    whole = batch(LETTERS, 3, position, first + second)
    assert whole == batch(LETTERS, 3, position, first) + batch(LETTERS, 3, position + first, second)


def test_epochs_and_seeds_are_shuffled_differently():
    orders = {tuple(batch(LETTERS, seed, 7 * epoch, 7)) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16
    assert tuple(LETTERS) not in orders


def test_sequence_is_the_same_for_ever():
    """A resumed run on another machine or version must not meet another order."""
    assert "".join(batch(LETTERS, 0, 5, 12)) == "abbdgaecffca"
