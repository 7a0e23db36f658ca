"""Requests to patch: made and withdrawn in any order and by any thread, all or nothing."""

import logging
import threading
import types

import pytest

from fused_elbo.integrations._patching import (
    Attribute,
    Item,
    Patch,
    PatchByOwner,
    Replacement,
    expect_parameters,
    peer,
)


def original(a, b):
    return "original"


def replacement(a, b):
    return "replacement"


@pytest.fixture
def module():
    module = types.ModuleType("peer")
    module.function = original
    return module


@pytest.fixture
def patch(module):
    def replacements():
        expect_parameters("test", module, "function", "a", "b")
        return [
            Replacement(Attribute(module, "function"), replacement),
            Replacement(Attribute(module, "added"), replacement),
        ]

    return Patch(replacements, "none")


def test_undo_restores_the_very_same_objects_and_removes_what_was_added(patch, module):
    before = dict(vars(module))
    patch.apply("x")
    assert module.function is replacement and module.added is replacement
    patch.undo()
    assert vars(module) == before and module.function is original


def test_applying_twice_is_applying_once_with_the_later_options(patch, module):
    patch.apply("first")
    patch.apply("second")
    assert patch.options == "second"
    patch.undo()
    assert module.function is original and patch.options == "none"
    patch.undo()
    assert module.function is original


def test_blocks_nest_and_the_latest_request_decides(patch, module):
    patch.apply("outer")
    with patch.applied("inner"):
        assert patch.options == "inner"
        with patch.applied("innermost"):
            assert patch.options == "innermost"
        assert patch.options == "inner"
    assert patch.options == "outer" and module.function is replacement
    patch.undo()
    assert module.function is original


def test_undo_inside_a_block_leaves_the_block_its_patch(patch, module):
    patch.apply("outer")
    with patch.applied("inner"):
        patch.undo()
        assert module.function is replacement and patch.options == "inner"
    assert module.function is original


def test_an_error_inside_a_block_restores_too(patch, module):
    with pytest.raises(KeyError), patch.applied("x"):
        raise KeyError
    assert module.function is original


def test_blocks_of_many_threads_overlap_and_the_last_one_restores(patch, module):
    wrong = []
    start = threading.Barrier(8)

    def work():
        start.wait()
        for _ in range(300):
            with patch.applied("x"):
                if module.function is not replacement:
                    wrong.append("not patched inside a block")

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and module.function is original


def test_a_function_of_other_parameters_is_refused_and_nothing_is_replaced(patch, module):
    module.function = changed = lambda a, c: None
    with pytest.raises(RuntimeError, match=r"peer.function must take \(a, b\), got \(a, c\)"):
        patch.apply("x")
    assert module.function is changed and not hasattr(module, "added")
    module.function = original
    patch.apply("x")  # the refusal has left nothing behind
    patch.undo()
    assert module.function is original


def test_what_someone_else_put_on_top_is_left_and_reported(patch, module, caplog):
    patch.apply("x")
    module.function = on_top = lambda a, b: None
    with caplog.at_level(logging.WARNING, "fused_elbo"):
        patch.undo()
    assert module.function is on_top
    assert "someone else has replaced" in caplog.text


def test_registry_entries_are_restored_and_the_registry_told():
    registry, told = {"key": original}, []
    patch = Patch(
        lambda: [Replacement(Item(registry, "key", lambda: told.append(1)), replacement)], None
    )
    with patch.applied(None):
        assert registry["key"] is replacement and len(told) == 1
    assert registry["key"] is original and len(told) == 2


def test_of_several_owners_all_are_patched_or_none(module):
    other = types.ModuleType("other")
    patches = PatchByOwner(
        lambda owner, _: [
            Replacement(
                Attribute(owner, "function"),
                expect_parameters("test", owner, "function", "a", "b") and replacement,
            )
        ],
        None,
    )
    with pytest.raises(RuntimeError, match=r"other\.function must take .*got nothing of that name"):
        patches.apply((module, other), None)
    assert module.function is original
    other.function = original
    patches.apply((module, other), None)
    patches.undo((module,))
    assert module.function is original and other.function is replacement
    patches.undo(())
    assert other.function is original


def test_a_missing_peer_is_named_with_its_remedy():
    with pytest.raises(ImportError, match=r"needs some-peer.*pip install some-peer"):
        peer("test", "some-peer", "fused_elbo_no_such_peer")
