"""Where a repository keeps what, below its directory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from repositories.package import Package


@dataclass(frozen=True, slots=True)
class Layout:
    """``top``: the repository's directory. What is below ``private`` only we may see."""

    top: Path

    # -- served --------------------------------------------------------------------------------------

    @property
    def pool(self) -> Path:
        return self.top / "pool"

    def file(self, package: Package) -> Path:
        return self.top / package.place

    def tree(self, sequence: int) -> Path:
        """A generation's own tree, which never changes."""
        return self.top / "generations" / str(sequence)

    @property
    def trees(self) -> Path:
        return self.top / "generations"

    def key(self, sequence: int) -> Path:
        """The public keys that a generation is signed by, armoured."""
        return self.tree(sequence) / "key.asc"

    def pointer(self, channel: str) -> Path:
        return self.top / "channels" / channel

    def mirrors(self, channel: str) -> Path:
        return self.top / "channels" / f"{channel}.mirrors"

    def published(self, channel: str, sequence: int) -> Path:
        return self.top / "published" / channel / str(sequence)

    @property
    def keys(self) -> tuple[Path, Path]:
        """The public keys: armoured, and not."""
        return self.top / "key.asc", self.top / "key.gpg"

    @property
    def pages(self) -> Path:
        """A page for each generation, for people."""
        return self.top / "pages"

    @property
    def index_page(self) -> Path:
        return self.top / "index.html"

    # -- ours alone ----------------------------------------------------------------------------------

    @property
    def private(self) -> Path:
        return self.top / ".farmhand"

    @property
    def lock(self) -> Path:
        return self.private / "lock"

    @property
    def description(self) -> Path:
        return self.private / "repository.json"

    @property
    def last_sequence(self) -> Path:
        return self.private / "sequence.json"

    def document(self, sequence: int) -> Path:
        return self.private / "generations" / f"{sequence}.json"

    @property
    def documents(self) -> Path:
        return self.private / "generations"

    def log(self, channel: str) -> Path:
        return self.logs / f"{channel}.jsonl"

    @property
    def logs(self) -> Path:
        return self.private / "logs"

    def chunk(self, digest: str) -> Path:
        return self.private / "chunks" / digest[:2] / digest

    @property
    def chunks(self) -> Path:
        return self.private / "chunks"

    def reading(self, sha256: str) -> Path:
        return self.private / "readings" / sha256[:2] / f"{sha256}.json"

    @property
    def readings(self) -> Path:
        return self.private / "readings"

    def rendered(self, digest: str, section: str, kind: str) -> Path:
        """The texts of a chunk's packages in one index, not compressed, after a line of sums; compressed
        beside it, with ``.gz``."""
        return self.private / "rendered" / digest[:2] / f"{digest}-{section.replace('/', '-')}-{kind}"

    @property
    def all_rendered(self) -> Path:
        return self.private / "rendered"

    def lease(self, holder: str) -> Path:
        return self.private / "leases" / f"{holder}.json"

    @property
    def leases(self) -> Path:
        return self.private / "leases"

    def flow(self, name: str) -> Path:
        return self.private / "flows" / f"{name}.json"

    @property
    def syncs(self) -> Path:
        """Locks: of each place that is being mirrored to."""
        return self.private / "syncs"

    @property
    def mirror_mark(self) -> Path:
        """What tells this repository's mirrors from others."""
        return self.private / "mirror-mark"

    @property
    def flows(self) -> Path:
        return self.private / "flows"

    @property
    def known_keys(self) -> Path:
        """The public keys that generations were ever signed by: each set twice, see below."""
        return self.private / "keys"

    def known_key(self, digest: str) -> tuple[Path, Path]:
        """A set of public keys, by the SHA-256 of its binary form: armoured, and not."""
        return self.known_keys / f"{digest}.asc", self.known_keys / f"{digest}.gpg"

    @property
    def shared(self) -> tuple[Path, ...]:
        """Directories in which files are replaced under their names."""
        channels = self.top / "channels"
        ours = self.documents, self.leases, self.flows, self.known_keys, self.logs
        return self.top, channels, self.private, *ours

    @property
    def staging(self) -> Path:
        """Of changes under way: a directory each, called by its process' mark."""
        return self.private / "staging"

    @property
    def trash(self) -> Path:
        return self.private / "trash"
