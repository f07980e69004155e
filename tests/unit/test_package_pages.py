"""Pages of package builds and of the farm: made from real records, read as a browser reads them."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import unicodedata
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit
from xml.etree import ElementTree

import pytest
from cycle_farm import Lab, Told, environment, lab, run, run_cycle
from page_farm import EVIL, PageFarm, picture

from builds import page as cycle_page
from builds.packages.drawing import GraphPicture
from builds.packages.inputs import InstalledPackage
from builds.packages.record import LOG
from builds.packages.runs import PACKAGES_LOCK, RunEntry
from builds.packages.verified import REBUILDS, Verified
from builds.pages import graph
from builds.pages.places import PagePlaces
from builds.pages.write import package_ended, run_ended, write_all
from builds.record import FileRecord, VmRecord
from host.program import ROOT
from inventory.loader import load
from provision.site import Site
from provision.status import status

__all__ = ["lab"]
_VOID = {"meta", "br", "img", "link", "hr", "input"}
_BLOCKS = {"p", "div", "ul", "ol", "dl", "pre", "table", "section", "h1", "h2", "details", "figure"}
_FOREIGN = {"script", "img", "iframe", "object", "embed", "link", "form", "input", "base"}


class Page(HTMLParser):
    """A page that is known to be well-formed. ``texts``: by element, what stands in it, in order."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.open: list[str] = []
        self.links: list[str] = []
        self.classes: list[str] = []
        self.texts: list[tuple[tuple[str, ...], str]] = []
        self.ids: list[str] = []
        self.headings: list[int] = []
        self.source = path.read_text()
        self.feed(self.source)
        self.close()
        assert not self.open, f"{path}: {self.open} is not closed"

    def handle_starttag(self, tag: str, found: list[tuple[str, str | None]]) -> None:
        values = dict(found)
        assert len(values) == len(found), f"{self.path}: {tag} has an attribute twice"
        assert tag not in _FOREIGN, f"{self.path}: <{tag}>"
        assert not any(name.startswith("on") or name == "src" for name in values), (self.path, found)
        if tag in _BLOCKS:
            assert "p" not in self.open, f"{self.path}: <{tag}> in a <p>: {self.getpos()}"
        self.classes += (values.get("class") or "").split()
        if tag == "a":
            self.links.append(values["href"] or "")
        if values.get("id"):
            self.ids.append(values["id"] or "")
        if tag in ("h1", "h2", "h3"):
            self.headings.append(int(tag[1]))
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, found: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, found)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in _VOID:
            assert self.open and self.open.pop() == tag, f"{self.path}: </{tag}> at {self.getpos()}"

    def handle_data(self, data: str) -> None:
        if data.strip() and self.open[-1] != "style":
            self.texts.append((tuple(self.open), " ".join(data.split())))

    @property
    def text(self) -> str:
        return " ".join(text for _, text in self.texts)

    def of(self, tag: str) -> list[str]:
        return [text for way, text in self.texts if tag in way]


@pytest.fixture
def farm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PageFarm:
    monkeypatch.setenv("FARMHAND_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("FARMHAND_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("FARMHAND_RUNTIME_DIR", str(tmp_path / "run"))
    return PageFarm(tmp_path)


def written(farm: PageFarm) -> PagePlaces:
    """All of them."""
    with farm.site() as site:
        assert not write_all(site).unreadable
    return PagePlaces.of(farm.paths)


def inodes(farm: PageFarm) -> dict[Path, int]:
    """A page that is replaced has another one."""
    return {path: path.stat().st_ino for path in farm.paths.root.rglob("*.html")}


def test_every_page_is_whole_leads_somewhere_and_is_harmless(farm: PageFarm) -> None:
    last = [farm.record(day=day) for day in (1, 2, 3)][-1]
    Verified(rebuild=1, at=last.ended, identical=False, differences=(EVIL,)).save(last.directory)
    farm.failed(day=4)
    farm.died("world")
    farm.publish(last)
    farm.run(4, RunEntry(name="hello", package="hello", state="failed", number=4, message=EVIL),
             RunEntry(name="p0001", package="p0001", state="skipped", because=EVIL), result="failed",
             revision=EVIL, notes=(EVIL,))  # fmt: skip
    farm.cycle()
    graph.keep_picture(PagePlaces.of(farm.paths), replace(picture(), problems=(EVIL,)))
    places = written(farm)
    pages = [Page(path) for path in sorted(farm.paths.root.rglob("*.html"))]
    assert {places.index, places.builds, places.farm, places.graph, places.package("world"),
            places.build("hello", 4)} <= {page.path for page in pages}  # fmt: skip
    assert len(pages) == 4 + 2 + 5 + 1
    for page in pages:
        assert page.headings[0] == 1 and page.headings.count(1) == 1, page.path
        assert len(set(page.ids)) == len(page.ids), page.path
        bad = {c for c in page.source if c != "\n" and unicodedata.category(c) in ("Cc", "Cf", "Cs")}
        assert not bad, (page.path, bad)
        assert "<script" not in page.source and "<img" not in page.source
        assert 'lang="en"' in page.source and "prefers-color-scheme: dark" in page.source
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme:
                assert link == "http://packages.example.org/kata/"
                continue
            assert not parts.path.startswith("/"), (page.path, link)
            assert (page.path.parent / unquote(parts.path)).is_file(), (page.path, link)
    told = "".join(page.text for page in pages)
    assert told.count(r"<script>alert('x')</script>\x1b[2J\u202e") > 10  # it is to be seen
    ElementTree.parse(places.drawing)


def test_what_a_link_needs_is_copied_with_three_directories(farm: PageFarm, tmp_path: Path) -> None:
    """Nothing else of the farm's state is to be served: keys are there."""
    farm.record()
    farm.cycle()
    written(farm)
    root = farm.paths.root
    for page in map(Page, root.rglob("*.html")):
        for link in page.links:
            if not urlsplit(link).scheme:
                to = Path(os.path.normpath(page.path.parent / unquote(urlsplit(link).path)))
                assert to.relative_to(root).parts[0] in ("pages", "packages", "builds"), link
    for name in ("pages", "packages"):
        assert (root / name).stat().st_mode & 0o777 == 0o755
    assert (root / "pages/index.html").stat().st_mode & 0o777 == 0o644


def test_a_failed_build_says_what_failed_first(farm: PageFarm) -> None:
    farm.record()
    record = farm.failed(day=2)
    page = Page(written(farm).build("hello", 2))
    assert page.of("h1") == ["hello 1.2"]
    assert "Failed after 34s on b1: source." in page.text
    assert "exit status 2" in page.text and "expected ';'" in page.text
    assert f"build --farm {farm.file} --package hello" in page.text  # as it is typed
    (tail,) = page.of("pre")
    assert "line 59" in tail and "line 3 " not in tail
    assert page.text.index("expected ';'") < page.text.index("Why it was built")
    assert "since it last passed" in page.text
    assert "build.log" in page.links and record.source.commit in page.text


def test_a_vm_that_died_shows_its_console_and_the_attempts_before(farm: PageFarm) -> None:
    farm.died()
    page = Page(written(farm).build("hello", 1))
    assert any("Kernel panic" in text for text in page.of("pre"))
    assert any("| make all" in text for text in page.of("pre"))  # what a guest says, as everywhere
    assert "attempt-1/build.log" in page.links
    assert "infrastructure" in page.of("summary") and "8.0s" in page.of("summary")


def test_a_passed_build_has_its_inputs_and_outputs(farm: PageFarm) -> None:
    record = farm.record(unchanged=0)
    Verified(rebuild=2, at=record.ended, identical=True).save(record.directory)
    again = record.directory / REBUILDS / "2" / LOG
    again.parent.mkdir(parents=True)
    again.write_text("once more\n")
    gone = farm.record(unchanged=1)
    (gone.directory / gone.outputs[0].path).unlink()
    places = written(farm)
    page = Page(places.build("hello", 1))
    assert "Passed in 27s on b1: 1 package came out." in page.text
    assert record.outputs[0].path in page.links and record.outputs[0].sha256 in page.of("td")
    assert f"{REBUILDS}/2/{LOG}" in page.links
    assert "identical" in page.text and "proven" in page.text
    assert page.text.index("libbase-dev") < page.text.index("lib7-dev")
    assert "40 others, of the template or from elsewhere" in page.of("summary")
    assert "lib7-dev" in page.of("details") and "libbase-dev" not in page.of("details")
    assert "libbase-dev was built otherwise" in page.of("li")
    page = Page(places.build("hello", 2))
    assert "the same bytes as in build 1" in page.text and "(gone)" in page.text
    assert gone.outputs[0].path not in page.links


def test_texts_without_end_are_cut(farm: PageFarm) -> None:
    long = "x" * 300_000
    many = tuple(f"{n} {long[:1000]}" for n in range(1000))
    installed = tuple(
        InstalledPackage(name=f"l{n}", version=long[:500], architecture="all") for n in range(9000)
    )
    record = farm.failed(why=many)
    record = replace(
        record, message=long, tail=long, console="\n".join(many), notes=many,
        inputs=replace(record.inputs, installed=installed),
        source=replace(record.source, subject=long),
    )  # fmt: skip
    record.save()
    page = Page(written(farm).build("hello", 1))
    assert len(page.source) < 2_000_000
    assert "and 950 more" in page.text and "and 6000 more" in page.text


def test_a_packages_builds_the_newest_first_and_in_which_channel(farm: PageFarm) -> None:
    records = [farm.record(day=day) for day in (1, 2, 3)]
    farm.failed(day=4)
    farm.publish(records[0], "stable")
    farm.publish(records[2])
    page = Page(written(farm).package("hello"))
    assert "Its last build, of 1.4, failed; the last that passed was build 3." in page.text
    told = [text for text in page.of("td") if text.startswith("build ")]
    assert told == ["build 4", "build 3", "build 2", "build 1"]
    lines = " ".join(page.of("ul"))
    assert "experimental build 3 1.3 stable build 1 1.1" in lines
    why = "its source changed: 1a2b3c4d5e6f before, 9f8e7d6c5b4a now, and 1 more"
    assert page.of("td").count(why) == 4
    bars = [bar.partition('"')[0] for bar in page.source.split('<i class="')[1:]]
    assert bars == ["passed"] * 3 + ["failed"]
    assert "The last 4 builds, 1 of them failed" in page.text


def test_the_graph_is_drawn_with_states_and_links(farm: PageFarm) -> None:
    farm.record("p0000")
    farm.run(1, RunEntry(name="p0001", package="p0001", state="taken"))
    farm.run(2, RunEntry(name="p0000", package="p0000", state="failed", number=1),
             RunEntry(name="p0003", package="p0003", state="skipped", because="p0000"))  # fmt: skip
    places = PagePlaces.of(farm.paths)
    graph.keep_picture(places, picture(5))
    page = Page(written(farm).graph)
    assert "svg" in {tag for way, _ in page.texts for tag in way}
    assert "5 packages: 2 waiting, 1 failed, 1 passed before, 1 skipped." in page.text
    assert page.links.count("../packages/p0000/index.html") == 2  # drawn, and in the list
    assert "p0000 failed" in page.of("li")  # why p0003 was skipped
    assert "p0000: failed" in page.of("title")
    assert "graph.svg" in page.links


def test_a_thousand_packages_are_lists(farm: PageFarm) -> None:
    places = PagePlaces.of(farm.paths)
    places.drawing.parent.mkdir()
    places.drawing.write_text("of fewer packages")
    graph.keep_picture(places, picture(1000))
    page = Page(written(farm).graph)
    assert "svg" not in {tag for way, _ in page.texts for tag in way}
    assert not places.drawing.exists() and "graph.svg" not in page.links
    assert len([text for text in page.of("li") if text.startswith("p0")]) == 1000
    assert len(page.source) < 400_000


def test_a_picture_that_is_damaged_is_none(farm: PageFarm) -> None:
    places = PagePlaces.of(farm.paths)
    assert graph.known_picture(places) is None
    graph.keep_picture(places, picture(3))
    assert graph.known_picture(places) == picture(3)
    need = {"build": "a", "needs": "b", "kind": "", "text": ""}
    for text in ('{"layers": [[', json.dumps({"layers": [["a"]], "needs": [need]})):
        places.picture.write_text(text)
        assert graph.known_picture(places) is None
    written(farm)
    assert not places.graph.exists()


_HOLD = """
import sys
from pathlib import Path
from provision.engine.locks import Locks
with Locks(Path(sys.argv[1])).hold(*sys.argv[2:], doing="build"):
    print(flush=True)
    sys.stdin.read()
"""


@contextlib.contextmanager
def held(farm: PageFarm, *locks: str) -> Iterator[int]:
    """By another process; its pid."""
    argv = [sys.executable, "-P", "-c", _HOLD, str(farm.paths.locks), *locks]
    env, pipe = {**os.environ, "PYTHONPATH": str(ROOT)}, subprocess.PIPE
    with subprocess.Popen(argv, stdin=pipe, stdout=pipe, env=env) as process:
        assert process.stdin and process.stdout and process.stdout.readline() == b"\n"
        yield process.pid
        process.stdin.close()


def test_the_farm_now(farm: PageFarm) -> None:
    done = farm.record()
    farm.publish(done)
    running = farm.record(result="running", run="20261105t100000z", outputs=())
    entry = RunEntry(name="hello", package="hello", state="running", number=running.number, vm="b2")
    farm.cycle()
    with (
        farm.site() as site,
        held(farm, PACKAGES_LOCK, "vm-b2") as pid,
        site.locks.hold("vm-prod", doing="mine"),
    ):
        farm.run(5, entry, result="running", pid=pid)
        status(site)
        before = set(farm.root.rglob("*"))
        assert not write_all(site).unreadable
        new = set(farm.root.rglob("*")) - before
    assert {path.suffix for path in new if path.is_file()} == {".html"}, new
    page = Page(PagePlaces.of(farm.paths).farm)
    assert "4 VMs: 4 not made." in page.text
    text = " ".join(page.of("li"))
    assert "b1 not made builds nothing b2 not made building hello" in text
    assert "../packages/hello/2/index.html" in page.links
    assert "experimental main 1 1; 588B" in " ".join(page.of("td"))
    assert "stable main none yet" in " ".join(page.of("td"))
    assert "build, by" in " ".join(page.of("td")) and "mine, by" not in page.text
    assert "Running on b1." in Page(PagePlaces.of(farm.paths).build("hello", 2)).text
    # The lock's holder is gone: it was killed
    places = written(farm)
    assert "building" not in Page(places.farm).of("span")
    assert "interrupted" in Page(places.build("hello", 2)).of("span")
    assert "Its last build, of 1.2, was interrupted" in Page(places.package("hello")).text


def test_the_index_leads_to_all(farm: PageFarm) -> None:
    farm.record("good")
    farm.failed("bad")
    farm.run(1, RunEntry(name="good", package="good", state="passed", number=1), result="failed")
    cycle = farm.cycle()
    damaged = farm.paths.builds / "20260101T000000Z"
    damaged.mkdir()
    (damaged / "record.json").write_text("{")
    with farm.site() as site:
        (line,) = write_all(site).unreadable
    assert str(damaged) in line
    page = Page(PagePlaces.of(farm.paths).index)
    assert "2 packages, by their last builds: 1 failed, 1 passed." in page.text
    assert "The last run of build failed. The last cycle passed." in page.text
    for link in ("farm.html", "../packages/bad/index.html", "../packages/good/1/index.html",
                 f"../builds/{cycle.id}/index.html"):  # fmt: skip
        assert link in page.links
    assert page.links.count("../packages/bad/index.html") == 2  # what didn't pass is above
    assert "20260101T000000Z" in page.text


def test_nothing_was_built_yet(farm: PageFarm) -> None:
    assert "Nothing was built yet." in Page(written(farm).index).text


def test_the_end_of_a_build_writes_its_own_pages_alone(farm: PageFarm) -> None:
    for name in ("hello", "other", "world"):
        farm.record(name)
    written(farm)
    before = inodes(farm)
    killed = farm.record(day=2, result="running", outputs=())
    record = farm.record(day=3)
    with farm.site() as site:
        package_ended(site, record)
    places, now = PagePlaces.of(farm.paths), inodes(farm)
    changed = {path for path, inode in now.items() if before.get(path) != inode}
    mine = {places.build("hello", record.number), places.package("hello")}
    assert changed == {*mine, places.build("hello", killed.number)}  # that one had none
    entries = (
        RunEntry(name="hello", package="hello", state="passed", number=3),
        RunEntry(name="other", package="other", state="taken", number=1),
    )
    with farm.site() as site:
        run_ended(site, farm.run(3, *entries), picture(2))
    later = inodes(farm)
    assert {path for path, inode in later.items() if now.get(path) != inode} == {
        places.package("hello"), places.graph, places.farm, places.index
    }  # fmt: skip


def test_the_first_build_has_an_index_to_lead_to(farm: PageFarm) -> None:
    record = farm.record()
    with farm.site() as site:
        package_ended(site, record)
    page = Page(PagePlaces.of(farm.paths).build("hello", 1))
    assert all((page.path.parent / unquote(link)).exists() for link in page.links)


def test_a_disk_that_refuses_is_said_and_holds_nothing_up(farm: PageFarm) -> None:
    record, told = farm.record(), Told()
    (farm.paths.root / "pages").write_text("in the way")
    with Site(load(farm.file), reporter=told) as site:
        package_ended(site, record)
        run_ended(site, farm.run(1), GraphPicture((), ()))
    assert len(told.warned) == 2
    for line in told.warned:
        assert line.startswith(": not all pages were written: ") and "/pages is a file" in line
        assert line.endswith("; later: pages")
    assert PagePlaces.of(farm.paths).build("hello", 1).exists()


def test_the_task(farm: PageFarm) -> None:
    farm.record()
    argv = [sys.executable, "-P", str(ROOT / "cli" / "start.py"), "--search-root", str(ROOT), "pages"]
    done = subprocess.run(
        [*argv, "--farm", str(farm.file), "--json"], stdin=subprocess.DEVNULL, capture_output=True,
        timeout=120, check=True, env={**environment(farm.root), **_places()},
    )  # fmt: skip
    told = json.loads(done.stdout)
    assert told["page"] == str(PagePlaces.of(farm.paths).index) and told["ok"]
    assert told["written"] == len(inodes(farm)) == 4 and told["unreadable"] == []


def _places() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith("FARMHAND_")}


def test_a_cycles_end_writes_the_index(lab: Lab) -> None:
    with Site(load(lab.farm_file([run("build", "echo built")])), reporter=lab.told) as site:
        record = run_cycle(site)
        page = Page(PagePlaces.of(site.paths).index)
        assert f"../builds/{record.id}/index.html" in page.links
        assert "The last cycle passed." in page.text
        assert {"../../pages/index.html", "../index.html"} <= {*Page(record.page).links}
        assert "../builds/index.html" in page.links
        assert f"{record.id}/index.html" in Page(PagePlaces.of(site.paths).builds).links


def test_no_table_scrolls_sideways(farm: PageFarm) -> None:
    """Where there is no room each becomes a list, whose cells say what they are."""
    record = farm.cycle()
    files = (FileRecord(name="a.deb", size=1, sha256="ab" * 32, path="a.deb", vm="dev2"),)
    steps = (replace(record.steps[0], files=files),)
    vms = (VmRecord(vm="dev2", host="here", boot_id="b" * 36),)
    cycle_page.write(replace(record, steps=steps, vms=vms, outputs=files))
    farm.publish(farm.record())
    places = written(farm)
    tables = 0
    for path in [record.page, *places.top.rglob("*.html")]:
        page = Page(path)
        body = page.source.partition("</style>")[2]
        tables += body.count("<table")
        assert body.count("<table") == body.count('<table class="listed') and "scroll" not in body, path
        assert body.count("<td") == body.count('<td role="cell" data-name="'), path
        assert page.source.count("overflow-x") == 1, "of logs, whose lines are wrapped"
    assert tables > 5


def test_a_cycles_page_is_well_formed(farm: PageFarm) -> None:
    record = farm.cycle()
    for result in ("failed", "interrupted", "running"):
        steps = (replace(record.steps[0], status=result, failure="source", tail=EVIL, console=EVIL),)
        cycle_page.write(replace(record, result=result, steps=steps))
        assert len(Page(record.page).of("pre")) == (1 if result == "running" else 3)
