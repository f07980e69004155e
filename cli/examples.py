"""Examples for ``--help TASK``: what is typed, and what it does. A test reads each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

EXAMPLES: Mapping[str, Sequence[tuple[str, str]]] = {
    # Before the first farm
    "doctor": [
        ("doctor", "what is missing on this machine, and how to put it right"),
        ("doctor --repair", "set the modes of farmhand's own files right"),
    ],
    "demo": [
        ("demo", "two VMs, a build in them, and what to type next"),
        ("demo --destroy", "take them away again"),
    ],
    # Templates
    "template-build": [
        ("template-build", "a new generation of the only template that is built"),
        ("template-build base --plan", "what that would do"),
        ("template-build base --fresh", "of today's packages, not of the disk in the cache"),
    ],
    "template-import": [
        ("template-import", "the image that the farm file names"),
        ("template-import base --image disk.vmdk", "another image, as template base"),
    ],
    "template-list": [("template-list", "all generations, with size and origin")],
    "template-remove": [("template-remove base@2", "that generation, if no VM grew from it")],
    # The farm
    "clone-farm": [
        ("clone-farm", "all VMs of the farm file; what is there stays"),
        ("clone-farm dev2 prod", "only these"),
        ("clone-farm --no-start", "made, not started"),
        ("clone-farm --plan", "what would be made"),
    ],
    "reset": [
        ("reset prod", "prod as it was when it was cloned, and started"),
        ("reset dev2 prod --to tools", "both back to their checkpoint tools, or none"),
        ("reset dev2 --to ready --cold", "boot, where ready has its memory too"),
        ("reset --all --wait 600", "all; if somebody is at work there, wait for up to ten minutes"),
    ],
    "balloon": [
        ("balloon prod --to 512M", "give prod 512 MiB, and see that it took"),
        ("balloon --all", "idle VMs down, then the others up"),
        ("balloon --plan-host", "who may have how much now"),
    ],
    "start": [
        ("start prod", "start it, and wait until ssh answers"),
        ("start --all --no-wait", "start all, and wait for none"),
    ],
    "stop": [
        ("stop prod", "ask the guest to shut down"),
        ("stop --all --force", "cut the power of all"),
    ],
    "checkpoint": [
        ("checkpoint dev2 --name tools", "for 'reset dev2 --to tools'"),
        ("checkpoint --all --name before-upgrade", "all VMs at one moment"),
        ("checkpoint dev2 --name ready --warm", "with what runs in it, which runs on"),
    ],
    "new": [
        (
            "new --source ~/src/hello",
            "a farm file for what is there: debian/, a spec file or a Makefile",
        ),
        ("new --source ~/src/hello --test 'hello --version'", "that runs what was installed, too"),
        ("new --source ~/src/hello --kind rpm --out hello.yaml", "as an rpm package, in that file"),
    ],
    "checkpoint-list": [("checkpoint-list dev2", "what dev2 can be put back to")],
    "checkpoint-remove": [("checkpoint-remove dev2 --name tools", "what no disk grows from")],
    "rename": [
        ("rename build --was prod", "the farm file calls it build now: prod goes on as that"),
        ("rename build --was prod --plan", "what that would do"),
    ],
    "renew": [
        ("renew prod", "prod's disk is of its template's newest generation"),
        ("renew --all", "all VMs that are on an older one"),
    ],
    "clean": [
        ("clean dev2 --packages ccache,git", "clean of dev2 is its template's, and these"),
        ("clean dev2 --packages ccache --script ca.sh --plan", "what that would do, with a script"),
        ("clean dev2 --from-template", "its template's own clean again"),
    ],
    "boot-unit": [
        ("boot-unit", "the systemd unit that starts VMs with 'autostart: yes'"),
        ("boot-unit --install", "write it and enable it"),
    ],
    "destroy": [
        ("destroy prod", "remove prod and its disk"),
        ("destroy --all", "the whole farm; on a terminal it asks first"),
    ],
    "gc": [
        ("gc --plan", "what nothing refers to any more"),
        ("gc", "remove it"),
        ("gc --caches", "and all that can be made again, and that nothing uses now"),
    ],
    "adopt": [
        ("adopt --plan", "VMs and templates of another farm of this name"),
        ("adopt prod", "take over prod"),
    ],
    "recover": [("recover", "finish or undo what a killed command left")],
    "unlock": [
        ("unlock --remote", "who holds the lock that the cycle shares"),
        ("unlock --remote --force", "end it, if that is dead for sure"),
    ],
    # Looking, and going in
    "status": [
        ("status", "the farm at a glance"),
        ("status --json", "the same for a program"),
        ("status --quiet", "the exit status alone: 0 where every host could be looked at"),
    ],
    "console": [
        ("console prod", "attach; leave with Ctrl-]"),
        ("console prod --log --lines 200", "the end of what it wrote"),
    ],
    "ssh": [
        ("ssh prod", "log in"),
        ("ssh prod -- ls -l /srv", "a command and its arguments, as they are"),
        ("ssh prod -- 'dmesg | tail'", "one word: a line for the shell there"),
    ],
    # Network services
    "render": [
        ("render", "all files of the network services"),
        ("render --service bind --out /tmp/files", "those of one, written below a directory"),
    ],
    "network-apply": [
        ("network-apply --plan", "how the files would change"),
        ("network-apply", "write them, reload what changed, and ask the services"),
    ],
    "network-verify": [
        ("network-verify", "ask the services about all VMs"),
        ("network-verify prod", "about prod"),
    ],
    "network-import": [
        (
            "network-import --zone /etc/bind/db.farm --dhcpd /etc/dhcp/dhcpd.conf --out farm.yaml",
            "a farm file from what is there",
        )
    ],
    # Building
    "cycle": [
        ("cycle", "the whole build cycle"),
        ("cycle --revision feature", "build that branch"),
        ("cycle --from pack", "begin with step pack"),
        ("cycle --only fetch --only pack", "these steps alone"),
        ("cycle --explain", "what each step does, with its scripts; does nothing"),
        ("cycle --debug", "where a step fails: a shell there"),
        ("cycle --wait", "if another one runs: when that has ended"),
    ],
    "log": [
        ("log", "the record of the last build"),
        ("log --step pack", "the log of its step pack"),
        ("log last-good", "the last one that passed; a commit, a branch or a version will do, too"),
        ("log --follow", "all steps of the running one, until it ends"),
        ("log hello/7", "a package's build"),
    ],
    "history": [
        ("history", "what was done and built, newest first"),
        ("history --limit 100", "more of it"),
        ("history prod --since yesterday --failed", "what went wrong with prod since then"),
        ("history --revision master", "builds of that branch"),
    ],
    "artifacts": [
        ("artifacts", "what the last build made"),
        ("artifacts last-good --to out", "the last good one's files, in the directory out"),
    ],
    "cp": [
        ("cp build:/var/log/dpkg.log .", "a file of the VM build, to here"),
        ("cp patches build:src", "the directory patches, into its login's src"),
    ],
    "pages": [("pages", "pages of all builds, packages and the farm")],
    # Packages
    "build": [
        ("build", "all packages that changed, and what needs them"),
        ("build hello --with-dependants", "hello, what it needs, and what needs it"),
    ],
    "packages": [("packages", "the farm's packages, with their last builds")],
    "graph": [
        ("graph", "what is built before what"),
        ("graph hello --svg graph.svg", "of one package, as a picture"),
    ],
    "why": [("why hello", "what has changed since hello was built")],
    "why-not": [("why-not hello", "what hello waits for")],
    "rebuild": [
        ("rebuild hello/7", "that build again, from its record"),
        ("rebuild hello --verify", "its last build, compared byte by byte"),
    ],
    # Farm files
    "farms": [("farms", "all of this machine, with their files, VMs and space")],
    "farm-twin": [("farm-twin --as second --revision next", "second.yaml, for a farm that builds next")],
    "farm-diff": [("farm-diff --with second.yaml --check", "what differs; 1 if they are not in step")],
    # Repositories
    "repo-add": [
        ("repo-add out/hello_1_amd64.deb", "a package into the first channel"),
        ("repo-add --build last", "all that the last build made"),
    ],
    "repo-remove": [("repo-remove hello --channel tested", "leave hello out of a channel")],
    "repo-promote": [
        ("repo-promote --from experimental --to tested", "all packages of a channel"),
        ("repo-promote --from 12 --to tested --package hello", "one package of a generation"),
    ],
    "repo-rollback": [
        ("repo-rollback --channel tested", "to the generation before"),
        ("repo-rollback --channel tested --to 9", "to generation 9"),
    ],
    "repo-import": [("repo-import --source /srv/old", "all packages of another repository")],
    "repo-list": [("repo-list", "the repositories and their channels")],
    "repo-show": [("repo-show", "the packages of the first channel")],
    "repo-diff": [("repo-diff --from tested --to experimental", "what differs between two channels")],
    "repo-log": [("repo-log", "generations, newest first")],
    "repo-why": [("repo-why hello", "where a package came from")],
    "repo-fsck": [("repo-fsck", "compare all files with their sums")],
    "repo-gc": [("repo-gc --plan", "what no kept generation has")],
    "repo-client": [("repo-client", "what a client of the repository needs")],
    "repo-serve": [("repo-serve", "serve it by HTTP, until Ctrl-C")],
    "repo-sync": [("repo-sync --to www@mirror:/srv/repo", "bring a mirror up to date")],
    "repo-queue": [
        ("repo-queue", "take what was uploaded, once: for cron"),
        ("repo-queue --watch", "go on until Ctrl-C"),
    ],
    "repo-pages": [("repo-pages", "a page of the repository and each generation")],
    # Flows
    "flow-begin": [("flow-begin try --path out/hello_1_amd64.deb", "a candidate for channel tested")],
    "flow-pass": [("flow-pass try --build last", "its channel gets what the last build tested")],
    "flow-fail": [("flow-fail try", "end it; its channel gets nothing")],
    "flow-bisect": [("flow-bisect try --failed", "the generation to be tested fails: halve it")],
    "flow-list": [("flow-list", "those that are open"), ("flow-list --over", "all")],
    "flow-show": [("flow-show try", "its packages and tests")],
    # farmhand's own development
    "test": [
        ("test --fast", "without the tests that start VMs"),
        ("test --only tests/unit/test_cli.py", "one file"),
    ],
    "lint": [("lint", "ruff and mypy")],
    "bench": [("bench --rounds 3", "fewer rounds")],
    "lab-up": [("lab-up", "the KVM lab"), ("lab-up --xen", "the Xen lab")],
    "lab-ssh": [("lab-ssh", "log in as root"), ("lab-ssh -- zpool list", "run a command there")],
    "lab-test": [("lab-test --kvm --only tests/lab", "some of its tests")],
    "lab-down": [("lab-down --all", "end all of them")],
}
