"""Remembered chains of keys against hashing everything."""

from array import array

from hypothesis import given, settings
from hypothesis import strategies as st

from cache_store import key_chains
from cache_store.key_chains import KeyChains
from cache_store.keys import BlockKey, chain_keys

ROOTS = [BlockKey(bytes([number]) * 16) for number in range(2)]


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(ROOTS), st.sampled_from([2, 4]), st.integers(0, 3), st.integers(0, 60), st.lists(st.integers(0, 1), max_size=9)
        ),
        min_size=1,
        max_size=30,
    ),
    st.sampled_from([64, 2000, 1 << 20]),
)
def test_remembered_or_not_the_keys_are_the_same(prompts, max_bytes):
    """Prompts of a few families, cut anywhere, with own tokens behind; and little room to remember them."""
    chains = KeyChains(max_bytes)
    for root, block_size, family, length, own in prompts:
        tokens = array("I", [*([family] * (length // 2)), *range(length - length // 2), *own])
        assert chains.keys(root, tokens, block_size) == chain_keys(root, tokens, block_size)
        assert chains._num_bytes <= max_bytes
        assert chains._num_bytes == sum(map(key_chains._size, chains._chains))


def test_a_shared_prefix_is_hashed_once(monkeypatch):
    hashed = []

    def counted(parent, token_ids, block_size):
        hashed.append(len(token_ids) // block_size)
        return chain_keys(parent, token_ids, block_size)

    monkeypatch.setattr(key_chains, "chain_keys", counted)
    chains = KeyChains()
    systems = [list(range(first, first + 2000)) for first in (0, 5000)]
    for turn in range(3):
        for system in systems:  # in turn, as users have them
            chains.keys(ROOTS[0], array("I", [7] * 16 + system + [turn] * 40), 16)
    assert hashed[:2] == [128, 127], "both begin with the same block"
    assert max(hashed[2:]) <= 4
    hashed.clear()
    conversation = array("I", range(10_000, 10_000 + 5 * 16))
    for _ in range(20):
        chains.keys(ROOTS[0], conversation, 16)
        conversation.extend(range(len(conversation), len(conversation) + 32))
    assert hashed == [5, *[2] * 19]


def test_the_list_is_the_callers_own():
    chains = KeyChains()
    tokens = array("I", range(64))
    chains.keys(ROOTS[0], tokens, 16).clear()
    assert chains.keys(ROOTS[0], tokens, 16) == chain_keys(ROOTS[0], tokens, 16)
