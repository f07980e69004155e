"""The contract of a disk store (hypervisors.api.Disks), on each."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from rigs import MIB, SIZE, sealed, template

from hypervisors.api import ChainedDisks, FarmDisks, Foreign, GrowableDisks, Owner
from inventory.errors import (
    Conflict,
    DriverFailed,
    Interrupted,
    NoSpace,
    NotFound,
    NotOurs,
    UsageError,
    WrongState,
)
from tests.identities import KATA, identity

PROD = Owner(KATA, "prod")
NAMESAKE = identity("kata", "/root/farm.yaml", "root@pc2")


class Killed(BaseException):
    """As if the process had been killed right before this step, except that `finally` runs."""


@pytest.fixture
def made(store):
    disks = store.disks()
    disks.clone(sealed(store, disks), "kata-prod", PROD, SIZE)
    return disks


def test_sealing_consumes_the_image_and_records_its_hash(store):
    disks, image = store.disks(), store.image()
    sealed = disks.seal(image, template())
    assert not image.exists()
    assert len(sealed.sha256) == 64
    assert list(disks.templates()) == [sealed]


def test_a_generation_is_sealed_once(store):
    disks = store.disks()
    first = disks.seal(store.image(), template())
    with pytest.raises(Conflict):
        disks.seal(store.image(), template())
    second = disks.seal(store.image(), template(2))
    assert list(disks.templates()) == [first, second]


def test_a_clone_reads_as_its_template_and_is_pristine(store, made):
    disk = made.find("kata-prod")
    assert (disk.owner, disk.template, disk.base) == (PROD, "base@1", "clean")
    assert [c.name for c in disk.checkpoints] == ["clean"]
    assert store.read("kata-prod") == "T"
    assert made.pristine("kata-prod", "clean")


def test_writing_ends_being_pristine(store, made):
    store.write("kata-prod", "A")
    assert not made.pristine("kata-prod", "clean")


def test_restore_brings_the_content_back(store, made):
    store.write("kata-prod", "A")
    made.restore("kata-prod", "clean")
    assert store.read("kata-prod") == "T"
    assert made.pristine("kata-prod", "clean")


def test_any_checkpoint_in_any_order(store, made):
    store.write("kata-prod", "A")
    made.checkpoint("kata-prod", "older")
    assert made.pristine("kata-prod", "older")
    store.write("kata-prod", "B")
    made.checkpoint("kata-prod", "newer")
    for name, content in [
        ("older", "A"),
        ("newer", "B"),
        ("clean", "T"),
        ("newer", "B"),
        ("older", "A"),
    ]:
        disk = made.restore("kata-prod", name)
        assert disk.base == name
        assert store.read("kata-prod") == content
        assert [c.name for c in disk.checkpoints] == ["clean", "older", "newer"]
        store.write("kata-prod", "X")
        assert not made.pristine("kata-prod", name)


def test_going_back_to_the_newest_is_proven_each_time(store, made):
    for letter in "AB":
        store.write("kata-prod", letter)
        made.checkpoint("kata-prod", letter)
        for _ in range(2):
            store.write("kata-prod", "X")
            made.restore("kata-prod", letter)
            assert store.read("kata-prod") == letter
            assert made.pristine("kata-prod", letter)
    assert [c.name for c in made.find("kata-prod").checkpoints] == ["clean", "A", "B"]
    made.destroy("kata-prod")
    assert list(made.leftovers()) == []


def test_checkpoint_names_are_taken_once(made):
    made.checkpoint("kata-prod", "one")
    for name in ("one", "clean"):
        with pytest.raises(Conflict):
            made.checkpoint("kata-prod", name)


def test_unknown_checkpoints_and_machines(made):
    with pytest.raises(NotFound):
        made.restore("kata-prod", "nothing")
    with pytest.raises(NotFound):
        made.restore("kata-nobody", "clean")
    assert made.find("kata-nobody") is None


def test_a_second_clone_is_a_conflict(store, made):
    with pytest.raises(Conflict):
        made.clone(made.templates()[0], "kata-prod", PROD, SIZE)


def test_clones_of_what_is_not_there_and_too_small_ones(made):
    with pytest.raises(NotFound):
        made.clone(template(7), "kata-x", PROD, SIZE)
    with pytest.raises(UsageError):
        made.clone(made.templates()[0], "kata-x", PROD, SIZE // 2)
    assert made.find("kata-x") is None


def test_a_larger_clone(made):
    assert made.clone(made.templates()[0], "kata-big", PROD, 4 * SIZE).size == 4 * SIZE


def test_a_template_in_use_stays(made):
    with pytest.raises(WrongState, match="kata-prod"):
        made.remove_template("base@1")
    made.destroy("kata-prod")
    made.remove_template("base@1")
    assert list(made.templates()) == []
    with pytest.raises(NotFound):
        made.remove_template("base@1")


@pytest.mark.parametrize("other", [identity("other"), NAMESAKE], ids=["another", "namesake"])
def test_another_farms_template_is_seen_and_let_be(store, made, other):
    made.destroy("kata-prod")  # so that nothing leans on it
    theirs = store.disks(other)
    (seen,) = theirs.templates()
    assert seen == made.templates()[0]
    assert seen.farm == KATA
    for change in (
        lambda: theirs.remove_template("base@1"),
        lambda: theirs.clone(seen, "other-prod", Owner(other, "prod"), SIZE),
    ):
        with pytest.raises(NotOurs) as caught:
            change()
        assert str(KATA) in caught.value.message and str(other) in caught.value.message
    assert theirs.find("other-prod") is None
    assert list(theirs.leftovers()) == []
    theirs.adopt_template("base@1", identity("kata", "/elsewhere.yaml"))  # it isn't that one's
    theirs.adopt_template("base@9", KATA)
    assert list(made.templates()) == [seen]
    made.remove_template("base@1")


def test_a_label_that_another_farm_has_is_refused_or_each_farms_own(store, made):
    theirs, image = store.disks(NAMESAKE), store.image()
    if store.kind == "xenapi":
        mine = theirs.seal(image, template())
        assert [t.farm for t in made.templates()] == [KATA, NAMESAKE]
        theirs.remove_template("base@1")
        assert [t.farm for t in theirs.templates()] == [KATA]
        assert mine.farm == NAMESAKE
        return
    with pytest.raises(Conflict, match=re.escape(f"base@1 exists already: it is farm {KATA}'s")):
        theirs.seal(image, template())
    assert image.exists()
    assert theirs.seal(image, template(2)).farm == NAMESAKE
    assert [(t.label, t.farm) for t in made.templates()] == [("base@1", KATA), ("base@2", NAMESAKE)]
    with pytest.raises(NotOurs):
        made.remove_template("base@2")
    theirs.remove_template("base@2")


def test_a_template_is_adopted_and_goes_on_as_ours(store, made):
    theirs, was = store.disks(NAMESAKE), made.templates()[0]
    theirs.adopt_template("base@1", KATA)
    theirs.adopt_template("base@1", KATA)
    (sealed,) = theirs.templates()
    assert sealed == replace(was, farm=NAMESAKE)
    with pytest.raises(NotOurs):
        made.remove_template("base@1")
    with pytest.raises((WrongState, NotOurs), match="kata-prod"):  # whosever depends on it
        theirs.remove_template("base@1")
    store.write("kata-prod", "A")
    made.restore("kata-prod", "clean")
    assert store.read("kata-prod") == "T"
    theirs.clone(sealed, "kata-new", Owner(NAMESAKE, "new"), SIZE)
    theirs.destroy("kata-new")
    made.adopt_template("base@1", NAMESAKE)
    assert list(made.templates()) == [was]


def test_another_farms_disk_is_left_alone(store, made):
    other = store.disks(identity("other"))
    assert list(other.list()) == []
    assert other.find("kata-prod").owner == PROD
    for change in (
        lambda: other.destroy("kata-prod"),
        lambda: other.restore("kata-prod", "clean"),
        lambda: other.checkpoint("kata-prod", "x"),
    ):
        with pytest.raises(NotOurs):
            change()
    assert [d.machine for d in made.list()] == ["kata-prod"]


def test_another_farm_of_the_same_name_is_another(store, made):
    other = store.disks(NAMESAKE)
    assert list(other.list()) == list(other.leftovers()) == list(made.others()) == []
    assert list(other.others()) == [Foreign("kata-prod", PROD)]
    owner = Owner(NAMESAKE, "prod")
    for change in (
        lambda: other.clone(made.templates()[0], "kata-prod", owner, SIZE),
        lambda: other.destroy("kata-prod"),
        lambda: other.restore("kata-prod", "clean"),
        lambda: other.checkpoint("kata-prod", "x"),
    ):
        with pytest.raises((NotOurs, Conflict, NotFound)):  # where templates are each farm's own
            change()
    assert [d.machine for d in made.list()] == ["kata-prod"]
    assert [c.name for c in made.find("kata-prod").checkpoints] == ["clean"]


def test_a_disk_is_adopted_with_all_that_is_its(store, made):
    store.write("kata-prod", "A")
    made.checkpoint("kata-prod", "one")
    other = store.disks(NAMESAKE)
    other.adopt("kata-prod", identity("kata", "/elsewhere.yaml"))  # it isn't that one's
    assert list(other.list()) == []
    other.adopt("kata-prod", KATA)
    (disk,) = other.list()
    assert (disk.owner, disk.base) == (Owner(NAMESAKE, "prod"), "one")
    assert [c.name for c in disk.checkpoints] == ["clean", "one"]
    assert list(made.list()) == list(other.others()) == list(other.leftovers()) == []
    assert list(made.others()) == [Foreign("kata-prod", Owner(NAMESAKE, "prod"))]
    with pytest.raises(NotOurs, match=re.escape(str(NAMESAKE))):
        made.restore("kata-prod", "clean")
    assert [d.base for d in [other.restore("kata-prod", "one")]] == ["one"]
    other.restore("kata-prod", "clean")
    other.destroy("kata-prod")
    assert other.find("kata-prod") is None
    assert list(other.leftovers()) == list(made.leftovers()) == []


def test_adopting_may_be_killed_before_each_of_its_steps(store, made):
    made.checkpoint("kata-prod", "one")
    for steps in range(20):
        left = iter(range(steps))

        def step(_text, left=left):
            if next(left, None) is None:
                raise Killed

        try:
            store.disks(NAMESAKE, step=step).adopt("kata-prod", KATA)
        except (Killed, Interrupted):
            others = {other.owner.farm for other in store.disks(NAMESAKE).others()}
            assert others <= {KATA}
            continue
        break
    assert steps, "it changes something"
    (disk,) = store.disks(NAMESAKE).list()
    assert [c.name for c in disk.checkpoints] == ["clean", "one"]
    assert list(made.list()) == list(store.disks(NAMESAKE).others()) == []
    store.disks(NAMESAKE).destroy("kata-prod")
    assert list(store.disks(NAMESAKE).leftovers()) == []


def test_destroy_takes_all_and_may_be_called_again(made):
    made.checkpoint("kata-prod", "one")
    made.destroy("kata-prod")
    made.destroy("kata-prod")
    assert made.find("kata-prod") is None
    assert list(made.list()) == list(made.leftovers()) == []


def test_ten_clones_at_once(made):
    sealed = made.templates()[0]
    with ThreadPoolExecutor(10) as pool:
        list(pool.map(lambda n: made.clone(sealed, f"kata-{n}", Owner(KATA, str(n)), SIZE), range(10)))
    assert len(made.list()) == 11
    assert list(made.leftovers()) == []


def names(disks):
    return [kept.name for kept in disks.find("kata-prod").checkpoints]


def test_a_checkpoint_is_removed_once_nothing_grows_from_it(store, made):
    for letter in "AB":
        store.write("kata-prod", letter)
        made.checkpoint("kata-prod", letter)
    with pytest.raises(WrongState, match="its disk grows from it"):
        made.remove_checkpoint("kata-prod", "B")
    with pytest.raises(UsageError, match="clean"):
        made.remove_checkpoint("kata-prod", "clean")
    with pytest.raises(NotFound):
        made.remove_checkpoint("kata-prod", "C")
    with pytest.raises(NotOurs):
        store.disks(identity("other")).remove_checkpoint("kata-prod", "A")
    made.restore("kata-prod", "clean")
    foretold = [*made.grown_from("kata-prod", "A")] if isinstance(made, ChainedDisks) else []
    try:
        made.remove_checkpoint("kata-prod", "A")
        assert foretold == []
    except WrongState as refused:  # where B is an overlay of it
        assert "B grows from it" in refused.message
        assert foretold == ["B"]
        assert names(made) == ["clean", "A", "B"]
    else:
        made.restore("kata-prod", "B")
        assert store.read("kata-prod") == "B"
        made.restore("kata-prod", "clean")
    made.remove_checkpoint("kata-prod", "B")
    if "A" in names(made):
        made.remove_checkpoint("kata-prod", "A")
    assert names(made) == ["clean"]
    assert store.read("kata-prod") == "T"
    assert made.pristine("kata-prod", "clean")
    made.checkpoint("kata-prod", "B")  # the name is free again
    assert list(made.leftovers()) == []


def test_removing_a_checkpoint_may_be_killed(store, made):
    store.write("kata-prod", "A")
    made.checkpoint("kata-prod", "one")
    made.restore("kata-prod", "clean")

    def step(_text):
        raise Killed

    with pytest.raises(Killed):
        store.disks(step=step).remove_checkpoint("kata-prod", "one")
    assert names(made) == ["clean", "one"]
    made.restore("kata-prod", "one")
    assert store.read("kata-prod") == "A"


def test_a_disk_moves_to_another_template_and_back(store, made):
    old, new = made.templates()[0], made.seal(store.image(), template(2))
    store.write("kata-prod", "A")
    made.checkpoint("kata-prod", "kept")
    store.write("kata-prod", "B")
    steps = 0
    while True:
        left = steps

        def step(_text):
            nonlocal left
            if left == 0:
                raise Killed
            left -= 1

        try:
            moved = store.disks(step=step).move("kata-prod", new)
        except Killed:
            steps += 1
            assert store.read("kata-prod") in ("B", "T")
            assert names(made) == ["clean", "kept"]
        else:
            break
    assert steps >= 1
    assert (moved.template, moved.base) == (new.label, "clean")
    assert (made.find("kata-prod").template, store.read("kata-prod")) == (new.label, "T")
    assert made.pristine("kata-prod", "clean")
    with pytest.raises(WrongState):
        made.remove_template(new.label)
    made.restore("kata-prod", "kept")
    assert store.read("kata-prod") == "A"
    made.restore("kata-prod", "clean")
    assert made.pristine("kata-prod", "clean")
    made.move("kata-prod", old)
    made.restore("kata-prod", "kept")
    assert (made.find("kata-prod").template, store.read("kata-prod")) == (old.label, "A")
    made.remove_template(new.label)
    made.destroy("kata-prod")
    assert list(made.leftovers()) == []


def test_a_template_stays_while_a_checkpoint_grows_from_it(store, made):
    """Also one whose disk has moved to another template, and grows from that checkpoint again."""
    new = made.seal(store.image(), template(2))
    store.write("kata-prod", "A")
    made.checkpoint("kata-prod", "kept")
    made.move("kata-prod", new)
    with pytest.raises(WrongState, match="template base@1 is in use by kata-prod"):
        made.remove_template("base@1")
    made.restore("kata-prod", "kept")
    assert store.read("kata-prod") == "A"
    made.checkpoint("kata-prod", "later")
    made.restore("kata-prod", "clean")
    with pytest.raises(WrongState, match="kata-prod"):
        made.remove_template("base@1")
    made.restore("kata-prod", "later")
    assert store.read("kata-prod") == "A"
    made.restore("kata-prod", "clean")
    for name in names(made)[:0:-1]:
        made.remove_checkpoint("kata-prod", name)
    made.remove_template("base@1")
    assert store.read("kata-prod") == "T"
    assert [one.label for one in made.templates()] == ["base@2"]


def test_moves_that_are_refused(store, made):
    with pytest.raises(NotFound):
        made.move("kata-prod", template(7))
    with pytest.raises(NotFound):
        made.move("kata-nobody", made.templates()[0])
    with pytest.raises(NotOurs):
        store.disks(identity("other")).move("kata-prod", made.templates()[0])


def test_a_disk_is_made_larger_in_place(store, made):
    assert isinstance(made, GrowableDisks)
    assert made.enlarge("kata-prod", 2 * SIZE).size == 2 * SIZE
    assert made.pristine("kata-prod", "clean"), "nothing was written"
    store.write("kata-prod", "A")
    made.checkpoint("kata-prod", "kept")
    store.write("kata-prod", "B")
    assert made.enlarge("kata-prod", 3 * SIZE).size == 3 * SIZE
    assert store.read("kata-prod") == "B"
    assert not made.pristine("kata-prod", "kept")
    kept = made.find("kata-prod").checkpoints
    for name, content in (("kept", "A"), ("kept", "A"), ("clean", "T"), ("kept", "A")):
        assert made.restore("kata-prod", name).size == 3 * SIZE
        assert made.find("kata-prod").size == 3 * SIZE
        assert store.read("kata-prod") == content
        assert made.pristine("kata-prod", name)
        assert made.find("kata-prod").checkpoints == kept, "they are what they were"
        assert list(made.leftovers()) == []
        store.write("kata-prod", "C")
    made.checkpoint("kata-prod", "later")
    made.restore("kata-prod", "later")
    assert (made.find("kata-prod").size, store.read("kata-prod")) == (3 * SIZE, "C")
    made.restore("kata-prod", "clean")
    for name in ("later", "kept"):
        made.remove_checkpoint("kata-prod", name)
    assert names(made) == ["clean"]
    made.destroy("kata-prod")
    made.remove_template("base@1")
    assert list(made.leftovers()) == []


def test_what_grows_no_disk(store, made):
    store.write("kata-prod", "A")
    made.enlarge("kata-prod", 2 * SIZE)
    for size in (SIZE, 2 * SIZE - MIB):
        with pytest.raises(UsageError, match="smaller"):
            made.enlarge("kata-prod", size)
    assert made.enlarge("kata-prod", 2 * SIZE).size == 2 * SIZE
    with pytest.raises(NotFound):
        made.enlarge("kata-nobody", 3 * SIZE)
    with pytest.raises(NotOurs):
        store.disks(identity("other")).enlarge("kata-prod", 3 * SIZE)
    steps = []
    with pytest.raises(NoSpace):
        store.disks(headroom=2**60, step=steps.append).enlarge("kata-prod", 3 * SIZE)
    assert steps == []
    assert (made.find("kata-prod").size, store.read("kata-prod")) == (2 * SIZE, "A")


def test_larger_disks_go_back_as_one(store, made):
    made.clone(made.templates()[0], "kata-dev2", Owner(KATA, "dev2"), SIZE)
    store.write("kata-prod", "A")
    made.checkpoint("kata-prod", "one")
    made.checkpoint("kata-dev2", "one")
    made.enlarge("kata-prod", 2 * SIZE)
    if isinstance(made, FarmDisks):
        for _ in range(2):
            store.write("kata-prod", "B")
            found = made.restore_all(["kata-prod", "kata-dev2"], "one")
            assert [disk.size for disk in found] == [2 * SIZE, SIZE]
            assert [store.read(name) for name in ("kata-prod", "kata-dev2")] == ["A", "T"]
            assert all(made.pristine(name, "one") for name in ("kata-prod", "kata-dev2"))


@pytest.mark.parametrize("untouched", [True, False], ids=["untouched", "written to"])
def test_growing_may_be_killed_before_each_of_its_steps(store, made, untouched):
    content = "T" if untouched else "A"
    if not untouched:
        store.write("kata-prod", "A")
    made.checkpoint("kata-prod", "one")
    if not untouched:
        store.write("kata-prod", "A")
    for steps in range(20):
        left = iter(range(steps))

        def step(_text, left=left):
            if next(left, None) is None:
                raise Killed

        try:
            grown = store.disks(step=step).enlarge("kata-prod", 2 * SIZE)
        except (Killed, Interrupted):
            assert made.find("kata-prod").size in (SIZE, 2 * SIZE)
            assert store.read("kata-prod") == content
            assert names(made) == ["clean", "one"]
            assert list(made.leftovers()) == []
            continue
        break
    assert steps >= 1
    assert (grown.size, store.read("kata-prod")) == (2 * SIZE, content)
    assert made.restore("kata-prod", "one").size == 2 * SIZE
    assert store.read("kata-prod") == content
    assert made.pristine("kata-prod", "one")
    assert list(made.leftovers()) == []


def test_too_little_room_is_refused_before_beginning(store, made):
    steps = []
    full = store.disks(headroom=2**60, step=steps.append)
    with pytest.raises(NoSpace):
        full.clone(made.templates()[0], "kata-x", PROD, SIZE)
    assert steps == []
    assert made.find("kata-x") is None


@pytest.mark.parametrize("what", ["seal", "clone", "checkpoint", "restore", "destroy"])
def test_abandoned_at_a_step_it_can_be_done_again(store, made, what):
    store.write("kata-prod", "A")
    made.checkpoint("kata-prod", "one")
    image = store.image()

    def act(disks):
        match what:
            case "seal":
                disks.seal(image, template(2))
            case "clone":
                disks.clone(made.templates()[0], "kata-new", Owner(KATA, "new"), SIZE)
            case "checkpoint":
                disks.checkpoint("kata-prod", "two")
            case "restore":
                disks.restore("kata-prod", "clean")
            case "destroy":
                disks.destroy("kata-prod")

    steps = 0
    while True:
        left = steps

        def step(_text):
            nonlocal left
            if left == 0:
                raise Killed
            left -= 1

        try:
            act(store.disks(step=step))
        except Killed:
            steps += 1
            assert store.read("kata-prod") == "A"
            assert [c.name for c in made.find("kata-prod").checkpoints] == ["clean", "one"]
            assert list(made.leftovers()) == []
        else:
            break
    assert steps >= 1


BOTH = ["kata-prod", "kata-dev2"]


@pytest.fixture
def both(store, made):
    """Two machines with a checkpoint "one" of content A; prod now holds B, dev2 C."""
    assert isinstance(made, FarmDisks)
    made.clone(made.templates()[0], "kata-dev2", Owner(KATA, "dev2"), SIZE)
    for machine in BOTH:
        store.write(machine, "A")
    made.checkpoint_all(BOTH, "one")
    store.write("kata-prod", "B")
    store.write("kata-dev2", "C")
    return made


def contents(store):
    return [store.read(machine) for machine in BOTH]


def test_several_go_back_and_forth_as_one(store, both):
    both.checkpoint_all(BOTH, "two")
    for name, content in [("one", ["A", "A"]), ("clean", ["T", "T"]), ("two", ["B", "C"])]:
        disks = both.restore_all(BOTH, name)
        assert [(d.machine, d.base) for d in disks] == [(machine, name) for machine in BOTH]
        assert contents(store) == content
        assert all(both.pristine(machine, name) for machine in BOTH)
    for machine in BOTH:
        assert [c.name for c in both.find(machine).checkpoints] == ["clean", "one", "two"]
    assert list(both.leftovers()) == []


def test_what_one_cannot_none_does(store, both):
    both.checkpoint("kata-dev2", "hers")
    with pytest.raises(NotFound):
        both.restore_all(BOTH, "hers")
    with pytest.raises(Conflict):
        both.checkpoint_all(BOTH, "hers")
    with pytest.raises(NotFound):
        both.restore_all(["kata-prod", "kata-nobody"], "clean")
    with pytest.raises(NotOurs):
        store.disks(identity("other")).restore_all(BOTH, "clean")
    assert contents(store) == ["B", "C"]
    assert [c.name for c in both.find("kata-prod").checkpoints] == ["clean", "one"]


@pytest.mark.parametrize("error", [Killed, DriverFailed], ids=["abandoned", "failed"])
@pytest.mark.parametrize("what", ["checkpoint_all", "restore_all"])
def test_several_failing_at_any_step_are_as_before(store, both, what, error):
    name = "one" if what == "restore_all" else "two"
    steps = 0
    while True:
        left = steps

        def step(text):
            nonlocal left
            if left == 0:
                raise error(text)
            left -= 1

        try:
            getattr(store.disks(step=step), what)(BOTH, name)
        except error:
            steps += 1
            assert contents(store) == ["B", "C"]
            disks = {disk.machine: disk for disk in both.list()}  # one look for both
            for machine in BOTH:
                assert [c.name for c in disks[machine].checkpoints] == ["clean", "one"]
                assert disks[machine].base == "one"
            assert list(both.leftovers()) == []
        else:
            break
    assert steps >= 1
    assert contents(store) == (["A", "A"] if name == "one" else ["B", "C"])


BUILD = Owner(KATA, "build")


def there(disks):
    """The machines that have a disk; never two that have the same."""
    found = [one for one in ("kata-prod", "kata-build") if disks.find(one)]
    assert sorted(disk.machine for disk in disks.list()) == sorted(found)
    assert len(found) <= 1
    return found


def test_a_disk_is_renamed_with_all_that_is_its(store, made):
    for letter in "AB":
        store.write("kata-prod", letter)
        made.checkpoint("kata-prod", letter)
    store.write("kata-prod", "C")
    before = made.find("kata-prod")
    renamed = made.rename("kata-prod", "kata-build", BUILD)
    assert (renamed.machine, renamed.owner, renamed.base) == ("kata-build", BUILD, "B")
    assert renamed.checkpoints == before.checkpoints, "with their ids"
    assert there(made) == ["kata-build"]
    assert made.find("kata-build").owner == BUILD
    assert store.read("kata-build") == "C"
    with pytest.raises(NotFound):
        made.restore("kata-prod", "A")
    for letter in "AB":
        made.restore("kata-build", letter)
        assert store.read("kata-build") == letter
        assert made.pristine("kata-build", letter)
        made.rename("kata-build", "kata-prod", PROD)
        assert made.pristine("kata-prod", letter), "it is as provable as it was"
        made.rename("kata-prod", "kata-build", BUILD)
    made.restore("kata-build", "clean")
    assert store.read("kata-build") == "T"
    with pytest.raises(WrongState, match="kata-build"):
        made.remove_template("base@1")
    made.clone(made.templates()[0], "kata-prod", PROD, SIZE)  # the name is free again
    store.write("kata-prod", "X")
    assert store.read("kata-build") == "T"
    for machine in ("kata-prod", "kata-build"):
        made.destroy(machine)
    assert list(made.leftovers()) == list(made.list()) == []


def test_renames_that_are_refused(store, made):
    made.clone(made.templates()[0], "kata-build", BUILD, SIZE)
    with pytest.raises(Conflict):
        made.rename("kata-prod", "kata-build", BUILD)
    with pytest.raises(NotFound):
        made.rename("kata-nobody", "kata-other", Owner(KATA, "other"))
    with pytest.raises((NotOurs, NotFound)):
        store.disks(identity("other")).rename("kata-prod", "kata-x", Owner(identity("other"), "x"))
    assert [disk.machine for disk in made.list()] == ["kata-build", "kata-prod"]


def test_a_rename_may_be_killed_before_each_of_its_steps(store, made):
    """And then is finished, or taken back: each in turn. Its checkpoint is a volume of its own."""
    store.write("kata-prod", "A")
    made.checkpoint("kata-prod", "one")
    made.restore("kata-prod", "clean")
    store.write("kata-prod", "B")
    kept = made.find("kata-prod").checkpoints
    for steps in range(20):
        left = iter(range(steps))

        def step(_text, left=left):
            if next(left, None) is None:
                raise Killed

        try:
            store.disks(step=step).rename("kata-prod", "kata-build", BUILD)
        except (Killed, Interrupted):
            after = store.disks()
            there(after)
            assert list(after.leftovers()) == [], "nothing that somebody would clear away"
            with pytest.raises(WrongState):
                after.remove_template("base@1")
            if steps % 2:
                after.rename("kata-prod", "kata-build", BUILD)
                assert there(after) == ["kata-build"]
            after.rename("kata-build", "kata-prod", PROD)
            assert there(after) == ["kata-prod"]
            assert after.find("kata-prod").checkpoints == kept
            assert store.read("kata-prod") == "B"
            continue
        break
    assert steps, "it changes something"
    assert there(store.disks()) == ["kata-build"]
    made.restore("kata-build", "one")
    assert store.read("kata-build") == "A"
    made.destroy("kata-build")
    assert list(made.leftovers()) == []
