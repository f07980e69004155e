"""What of a graph hangs together in circles."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence


def components(edges: Sequence[Iterable[int]]) -> list[list[int]]:
    """The strongly connected components of a graph, each after all that it leads to (Tarjan, 1972).
    ``edges``: of each vertex, where they lead. Each edge is looked at once, and nothing recurs."""
    index: list[int] = [-1] * len(edges)
    low = [0] * len(edges)
    on_stack = [False] * len(edges)
    stack: list[int] = []
    found: list[list[int]] = []
    count = 0
    for root in range(len(edges)):
        if index[root] >= 0:
            continue
        way: list[tuple[int, Iterator[int]]] = [(root, iter(edges[root]))]
        index[root] = low[root] = count
        count += 1
        stack.append(root)
        on_stack[root] = True
        while way:
            vertex, rest = way[-1]
            end = next(rest, -1)
            if end < 0:
                way.pop()
                if way:
                    above = way[-1][0]
                    low[above] = min(low[above], low[vertex])
                if low[vertex] == index[vertex]:
                    at = len(stack) - 1
                    while stack[at] != vertex:
                        at -= 1
                    found.append(stack[at:])
                    del stack[at:]
                    for each in found[-1]:
                        on_stack[each] = False
            elif index[end] < 0:
                index[end] = low[end] = count
                count += 1
                stack.append(end)
                on_stack[end] = True
                way.append((end, iter(edges[end])))
            elif on_stack[end]:
                low[vertex] = min(low[vertex], index[end])
    return found
