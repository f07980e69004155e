"""Facts as LVM tags."""

from __future__ import annotations

import re

from hypothesis import given
from hypothesis import strategies as st

from hypervisors.disks.lvm.command import decode, encode, retagged

TEXT = st.text(st.characters(blacklist_categories=("Cs",)), max_size=3000)
KEYS = st.sampled_from(["kind", "origin", "name", "size"])


@given(st.dictionaries(KEYS, TEXT))
def test_any_text_comes_back_from_tags_that_lvm_takes(facts):
    tags = encode(facts)
    assert all(re.fullmatch(r"[A-Za-z0-9_+.\-/=!:&#]{1,1024}", tag) for tag in tags)
    assert decode(tuple(reversed(("farmhand", "somebody/else's=tag", *tags)))) == facts


@given(st.dictionaries(KEYS, TEXT), st.dictionaries(KEYS, TEXT))
def test_a_change_of_facts_takes_and_adds_what_differs(old, new):
    words = retagged(old, new)
    changes = list(zip(words[::2], words[1::2], strict=True))
    tags = set(encode(old)) - {t for w, t in changes if w == "--deltag"}
    tags |= {t for w, t in changes if w == "--addtag"}
    assert tags == set(encode(new))
    assert all(w == "--deltag" for w, _ in changes[: sum(w == "--deltag" for w, _ in changes)])


def test_tags_of_somebody_elses_kind_are_left_out():
    assert decode(("fh.", "fh.x", "fh.a+b=1", "plain", "fh.k=v#")) == {"k": "v#"}
