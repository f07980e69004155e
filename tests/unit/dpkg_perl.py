"""dpkg's own judgement of relations: the modules that dpkg-checkbuilddeps is made of, in one process
that answers a line for each line."""

from __future__ import annotations

import subprocess
from types import TracebackType

_PROGRAM = r"""
use strict; use warnings; no warnings 'once';
use Dpkg::Arch qw(debarch_is debarch_is_concerned get_valid_arches);
use Dpkg::Deps;
use Dpkg::Control::Info;
use Dpkg::ErrorHandling qw(report_options);
report_options(quiet_warnings => 1);
$| = 1;
my $facts = Dpkg::Deps::KnownFacts->new();
my %do = (
    valid => sub { join ' ', get_valid_arches() },
    is => sub { debarch_is($_[0], $_[1]) ? 1 : 0 },
    concerned => sub { debarch_is_concerned($_[0], split ' ', $_[1]) ? 1 : 0 },
    left => sub {
        my ($arch, $profiles, $text) = @_;
        my $deps = deps_parse($text, build_dep => 1, reduce_restrictions => 1, host_arch => $arch,
            build_arch => $arch, build_profiles => [split ' ', $profiles]);
        return '!' unless defined $deps;
        my $said = $deps->output();
        $said =~ s/ \[[^\]]*\]//g; $said =~ s/ <[^>]*>//g;
        return $said;
    },
    forget => sub { $facts = Dpkg::Deps::KnownFacts->new(); 1 },
    package => sub { $facts->add_installed_package(@_); 1 },
    provides => sub {
        my ($text, $by) = @_;
        my $deps = deps_parse($text, virtual => 1, union => 1);
        $facts->add_provided_package($_->{package}, $_->{relation}, $_->{version}, $by)
            for $deps->get_deps();
        return 1;
    },
    met => sub {
        my ($arch, $text) = @_;
        my $deps = deps_parse($text, build_dep => 1, host_arch => $arch, build_arch => $arch);
        return $deps->get_evaluation($facts) ? 1 : 0;
    },
    control => sub {
        my $pid = open(my $out, '-|') // die;
        if (!$pid) {
            open STDERR, '>', '/dev/null';
            my $info = Dpkg::Control::Info->new($_[0]);
            my @all = map { "$_->{Package}=$_->{Architecture}" } $info->get_packages();
            print join(' ', $info->get_source()->{Source}, @all);
            exit 0;
        }
        my $said = join '', <$out>;
        close $out;
        return $? ? '!' : $said;
    },
);
while (my $line = <STDIN>) {
    chomp $line;
    my ($what, @words) = split /\t/, $line, -1;
    my $said = $do{$what}->(@words);
    print "$said\n";
}
"""


class DpkgPerl:
    def __enter__(self) -> DpkgPerl:
        self._child = subprocess.Popen(
            ["perl", "-e", _PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._child.communicate()

    def ask(self, what: str, *words: str) -> str:
        assert self._child.stdin and self._child.stdout
        assert not any(mark in word for word in words for mark in "\t\n")
        self._child.stdin.write("\t".join((what, *words)) + "\n")
        self._child.stdin.flush()
        answer = self._child.stdout.readline()
        assert answer.endswith("\n"), f"perl ended at {what} {words}"
        return answer[:-1]
