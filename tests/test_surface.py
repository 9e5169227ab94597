"""The public names: whoever changes one changes this list, and says so in the changelog."""

import inspect

import pullback

PUBLIC = """
""".split()


def test_public_names():
    assert list(pullback.__all__) == PUBLIC


def test_every_public_name_is_there_and_says_what_it_is():
    for name in PUBLIC:
        value = getattr(pullback, name)
        if inspect.isfunction(value) or inspect.isclass(value):
            assert inspect.getdoc(value), name


def test_nothing_else_is_public():
    stray = {
        name
        for name, value in vars(pullback).items()
        if not name.startswith("_") and name not in PUBLIC and not inspect.ismodule(value)
    }
    assert stray == set()
