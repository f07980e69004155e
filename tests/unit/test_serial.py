"""Serial numbers go forward, whatever they were."""

from datetime import date

import pytest
from hypothesis import given
from hypothesis import strategies as st

from provision.network.serial import following, later, serial_of, with_serial

TODAY = date(2026, 11, 21)
serials = st.integers(0, 2**32 - 1)


@given(serials, serials)
def test_never_backwards(one: int, other: int) -> None:
    new = following([one], TODAY)
    assert later(new, one)
    assert new != 0
    if later(one, other):
        assert later(following([one, other], TODAY), one)
        assert later(following([other, one], TODAY), one)


def test_two_hundred_changes_of_a_day_and_the_next_day() -> None:
    serial = following([], TODAY)
    assert serial == 2026112100
    for _ in range(200):
        new = following([serial], TODAY)
        assert later(new, serial)
        serial = new
    assert serial == 2026112300
    assert following([serial], date(2026, 11, 22)) == 2026112301
    assert following([serial], date(2026, 11, 24)) == 2026112400


@pytest.mark.parametrize(
    ("old", "new"), [(7, 8), (1700000000, 1700000001), (2**32 - 1, 1), (2026112100, 2026112101)]
)
def test_other_schemes_go_on(old: int, new: int) -> None:
    assert following([old], TODAY) == new


ZONES = [
    "@ IN SOA ns h ( 42 1 1 1 1 )\n",
    "@ IN SOA ns h 42 1 1 1 1\n",
    "$TTL 1\n; SOA a b ( 1 )\n@\tIN\tSOA\tns.x. h.x. (\n\t\t\t42\t; Serial\n\t\t\t1 )\n",
    "@ in soa ns h (\n; the serial comes\n ; now\n  42\n 1 1 1 1 )\n",
    "x. 3600 IN SOA ns. h. ( ; 17\n 42 ; serial\n 1 1 1 1 )\n",
]


@pytest.mark.parametrize("text", ZONES)
def test_found_and_changed_in_any_zone_file(text: str) -> None:
    assert serial_of(text) == 42
    assert with_serial(text, 43) == text.replace("42", "43")


def test_no_soa() -> None:
    assert serial_of("a IN A 10.0.0.1\n") is None
