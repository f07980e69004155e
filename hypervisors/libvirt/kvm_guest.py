"""The guest by which KVM is judged: what a kernel needs of a CPU, in 675 bytes, and an answer that only
a guest that had all of it can give.

It writes a letter to QEMU's debug port (isa-debugcon) at each stage it reaches, then the sum that its
work came to and how long that took by the ACPI PM timer, which is the host's clock: neither the
firmware's time nor QEMU's own is in it.
"""

from __future__ import annotations

STATUS = 2 * 42 + 1
"""What QEMU exits with at the end of it, by isa-debug-exit at ``EXIT_PORT``."""
EXIT_PORT = 0xF4
STAGES = {
    "": "none of its code ran",
    "F": "it did not get into long mode",
    "L": "it had no page fault",
    "P": "it had no timer interrupt",
    "I": "it had no timer interrupt of its local APIC",
    "A": "it did not end its work",
}
"""What is wrong, by the last letter that was told."""

# Its bytes, and beside them what they are, for GNU as (Intel syntax); a test holds the two together.
LISTING = """\
| # Multiboot header (specification 0.6.96, 3.1.1): QEMU loads all of this at 1 MiB and goes to `enter`,
| # in 32-bit protected mode, flat, interrupts off.
                     |         .code32
02b0ad1b             | start:  .long 0x1BADB002
00000100             |         .long 0x10000
fe4f51e4             |         .long -(0x1BADB002 + 0x10000)
0000100000001000     |         .long 0x100000, 0x100000
0000000000000000     |         .long 0, 0
20001000             |         .long 0x100000 + enter - start
b046                 | enter:  mov al, 'F'                         # at the debug port: firmware done
e6e9                 |         out 0xE9, al
| # Page tables of 4 GiB at 2 MiB: one PML4, one PDPT, four page directories with two entries: this code
| # and the tables. What else is touched comes by page faults, see `fault`.
fc                   |         cld
bf00002000           |         mov edi, 0x200000
b900200000           |         mov ecx, 0x2000                     # IDT (0x206000), counters (0x207000)
31c0                 |         xor eax, eax
f3ab                 |         rep stosd
c7050000200003102000 |         mov dword ptr [0x200000], 0x201003
b803202000           |         mov eax, 0x202003
bf00102000           |         mov edi, 0x201000
8907                 | 1:      mov [edi], eax
83c708               |         add edi, 8
0500100000           |         add eax, 0x1000
3d03602000           |         cmp eax, 0x206003
72ef                 |         jb 1b
c7050020200083000000 |         mov dword ptr [0x202000], 0x000083
c7050820200083002000 |         mov dword ptr [0x202008], 0x200083
| # Long mode: CR4.PAE, EFER.LME, CR0.PG
b800002000           |         mov eax, 0x200000
0f22d8               |         mov cr3, eax
0f20e0               |         mov eax, cr4
83c820               |         or eax, 0x20
0f22e0               |         mov cr4, eax
b9800000c0           |         mov ecx, 0xC0000080
0f32                 |         rdmsr
0d00010000           |         or eax, 0x100
0f30                 |         wrmsr
0f20c0               |         mov eax, cr0
0d00000080           |         or eax, 0x80000000
0f22c0               |         mov cr0, eax
0f01157f021000       |         lgdt [0x100000 + gdtr - start]
eaa40010000800       |         ljmp 8, 0x100000 + long - start
                     |         .code64
66b81000             | long:   mov ax, 16
8ed8                 |         mov ds, ax
8ec0                 |         mov es, ax
8ed0                 |         mov ss, ax
bc00802000           |         mov esp, 0x208000
b04c                 |         mov al, 'L'                         # in long mode
e6e9                 |         out 0xE9, al
| # The IDT, from the table at `gates`: the low half of an interrupt gate, whose upper half is 0
be8f021000           |         mov esi, 0x100000 + gates - start
48ba00000800008e1000 |         mov rdx, 0x00108E0000080000
0fb73e               | 2:      movzx edi, word ptr [rsi]
0fb74602             |         movzx eax, word ptr [rsi + 2]
4809d0               |         or rax, rdx
48898700602000       |         mov [rdi + 0x206000], rax
83c604               |         add esi, 4
81fea3021000         |         cmp esi, 0x100000 + end - start
72e4                 |         jb 2b
0f011c2585021000     |         lidt [0x100000 + idtr - start]
bb0000e0fe           |         mov ebx, 0xFEE00000                 # the local APIC: here for good
c783f00000004f010000 |         mov dword ptr [rbx + 0xF0], 0x14F   # a page fault; on, spurious: 0x4F
b050                 |         mov al, 'P'                         # paging, with faults
e6e9                 |         out 0xE9, al
| # The 8259 from vector 0x20 on, all masked but the 8254's channel 0, which gets 250 Hz
b011                 |         mov al, 0x11
e620                 |         out 0x20, al
b020                 |         mov al, 0x20
e621                 |         out 0x21, al
b004                 |         mov al, 4
e621                 |         out 0x21, al
b001                 |         mov al, 1
e621                 |         out 0x21, al
b0ff                 |         mov al, 0xFF
e6a1                 |         out 0xA1, al
b0fe                 |         mov al, 0xFE
e621                 |         out 0x21, al
b034                 |         mov al, 0x34
e643                 |         out 0x43, al
b0a4                 |         mov al, 4772 & 255
e640                 |         out 0x40, al
b012                 |         mov al, 4772 >> 8
e640                 |         out 0x40, al
fb                   |         sti
f4                   | 3:      hlt
833c250070200004     |         cmp dword ptr [0x207000], 4
72f5                 |         jb 3b
b0ff                 |         mov al, 0xFF
e621                 |         out 0x21, al
b049                 |         mov al, 'I'                         # four interrupts of the 8254
e6e9                 |         out 0xE9, al
| # The local APIC's timer, vector 0x40, periodic: 1 GHz / 16 / 250000 is 250 Hz, as a kernel has it
c783e003000003000000 |         mov dword ptr [rbx + 0x3E0], 3
c7832003000040000200 |         mov dword ptr [rbx + 0x320], 0x20040
c7838003000090d00300 |         mov dword ptr [rbx + 0x380], 250000
f4                   | 4:      hlt
833c250870200004     |         cmp dword ptr [0x207008], 4
72f5                 |         jb 4b
b041                 |         mov al, 'A'                         # four of the local APIC; they go on
e6e9                 |         out 0xE9, al
| # The work: 100 rounds over 4 MiB at 16 MiB, a cache line a step. RBP sums up the clock's ticks.
49b92d7f954c2df45158 |         mov r9, 6364136223846793005
49ba4f8167f77e7b0514 |         mov r10, 1442695040888963407
b801000000           |         mov eax, 1
be02000000           |         mov esi, 2
41bc03000000         |         mov r12d, 3
41b864000000         |         mov r8d, 100
e873000000           |         call clock
31ed                 |         xor ebp, ebp
bf00000001           | 5:      mov edi, 0x1000000
b900000100           |         mov ecx, 65536
e841000000           | 6:      call step
83c740               |         add edi, 64
ffc9                 |         dec ecx
75f4                 |         jnz 6b
488b47c0             |         mov rax, [rdi - 64]                 # what was written must be there
e852000000           |         call clock
4401dd               |         add ebp, r11d
41ffc8               |         dec r8d
75d9                 |         jnz 5b
| # The answer: the sum of the three, 8 bytes, and the ticks, 4 bytes, the lowest first; then the end
fa                   |         cli
4801f0               |         add rax, rsi
4c01e0               |         add rax, r12
b908000000           |         mov ecx, 8
e6e9                 | 7:      out 0xE9, al
48c1e808             |         shr rax, 8
e2f8                 |         loop 7b
89e8                 |         mov eax, ebp
b904000000           |         mov ecx, 4
e6e9                 | 8:      out 0xE9, al
c1e808               |         shr eax, 8
e2f9                 |         loop 8b
b02a                 |         mov al, 42                          # QEMU exits with 2 * 42 + 1
e6f4                 |         out 0xF4, al
f4                   | 9:      hlt
ebfd                 |         jmp 9b
| # Three linear congruential generators (Knuth's MMIX), a step each
490fafc1             | step:   imul rax, r9
4c01d0               |         add rax, r10
488907               |         mov [rdi], rax
490faff1             |         imul rsi, r9
4c01d6               |         add rsi, r10
48897708             |         mov [rdi + 8], rsi
4d0fafe1             |         imul r12, r9
4d01d4               |         add r12, r10
4c896710             |         mov [rdi + 16], r12
c3                   |         ret
| # R11 = ticks of the ACPI PM timer (24 bits, 3.579545 MHz, where the firmware put it) since the last
4989c5               | clock:  mov r13, rax
ba08060000           |         mov edx, 0x608
ed                   |         in eax, dx
4189c3               |         mov r11d, eax
4529f3               |         sub r11d, r14d
4181e3ffffff00       |         and r11d, 0xFFFFFF
4189c6               |         mov r14d, eax
4c89e8               |         mov rax, r13
c3                   |         ret
| # A page fault: map the 2 MiB around the address to themselves
50                   | fault:  push rax
51                   |         push rcx
0f20d0               |         mov rax, cr2
89c1                 |         mov ecx, eax
c1e915               |         shr ecx, 21
250000e0ff           |         and eax, 0xFFE00000
0d83000000           |         or eax, 0x83
488904cd00202000     |         mov [rcx * 8 + 0x202000], rax
59                   |         pop rcx
58                   |         pop rax
4883c408             |         add rsp, 8                          # the error code
48cf                 |         iretq
ff042500702000       | pit:    inc dword ptr [0x207000]
50                   |         push rax
b020                 |         mov al, 0x20
e620                 |         out 0x20, al
58                   |         pop rax
48cf                 |         iretq
ff042508702000       | apic:   inc dword ptr [0x207008]
c783b000000000000000 |         mov dword ptr [rbx + 0xB0], 0
48cf                 | ignore: iretq
0000000000000000     | gdt:    .quad 0
ffff0000009aaf00     |         .quad 0x00AF9A000000FFFF            # 8: code, 64 bits
ffff00000092cf00     |         .quad 0x00CF92000000FFFF            # 16: data
1700                 | gdtr:   .word 23
67021000             |         .long 0x100000 + gdt - start
ff0f                 | idtr:   .word 0xFFF
0060200000000000     |         .quad 0x206000
e0002102             | gates:  .word 16 * 14, fault - start
00024502             |         .word 16 * 0x20, pit - start
70026502             |         .word 16 * 0x27, ignore - start     # the 8259's spurious one
00045402             |         .word 16 * 0x40, apic - start
f0046502             |         .word 16 * 0x4F, ignore - start     # the local APIC's
                     | end:
"""

IMAGE = bytes.fromhex("".join(line.partition("|")[0] for line in LISTING.splitlines()))

_ROUNDS, _LINES = 100, 65536
_A, _C, _M = 6364136223846793005, 1442695040888963407, 2**64
_CLOCK = 3_579_545  # Hz (Advanced Configuration and Power Interface, 4.8.2.1)


def read_answer(told: bytes) -> tuple[str, float | None]:
    """The letter of the last stage that was reached, and the seconds that the work took. They are None
    if the work didn't come to its end, or to a wrong sum."""
    stages, answer = told[: len(STAGES) - 1], told[len(STAGES) - 1 :]
    seconds = int.from_bytes(answer[8:], "little") / _CLOCK
    right = answer[:8] == _sum().to_bytes(8, "little")
    reached = stages[-1:].decode("ascii", "replace")
    return reached if reached in STAGES else "", seconds if right else None


def _sum() -> int:
    """The right sum of the generators' numbers, by steps that double: x, 2x, 4x ..."""
    steps, a, c = _ROUNDS * _LINES, 1, 0
    times_a, plus_c = _A, _C
    while steps:
        if steps & 1:
            a, c = a * times_a % _M, (c * times_a + plus_c) % _M
        plus_c, times_a = (times_a + 1) * plus_c % _M, times_a * times_a % _M
        steps >>= 1
    return sum(a * seed + c for seed in (1, 2, 3)) % _M
