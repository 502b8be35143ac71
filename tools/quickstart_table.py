#!/usr/bin/env python3
"""Prints what ./quickstart has measured as a table.

    quickstart_table.py LABEL=EAGER,LAZY...

Each of EAGER and LAZY names three files here: NAME.json is what tinyvmm said (resume --json), NAME.before and
NAME.after what the server had done until then (uffdkit status --json).
"""
import json
import sys

COLUMNS = ["", "first instruction", "work done", "pages served", "bytes read", "faults taken"]
MIB = 1 << 20


def load(name):
    with open(name) as file:
        return json.load(file)


class Run:
    def __init__(self, label, name):
        guests, before, after = load(f"{name}.json"), load(f"{name}.before"), load(f"{name}.after")
        if not guests["verified"]:
            sys.exit(f"quickstart: {label}: a guest found wrong memory")

        def served(counter):
            return after["total"].get(counter, 0) - before["total"].get(counter, 0)

        clones = guests["clones"]
        self.lazy = guests["memory"] == "lazy"
        self.label = f"{label}: {'lazy' if self.lazy else 'read first'}"
        self.first_ms = max(clone["first_instruction_ms"] for clone in clones)
        self.done_ms = max(clone["done_ms"] for clone in clones)
        self.memory_bytes = guests["memory_bytes"]
        self.bytes_read = served("bytes_read") if self.lazy else self.memory_bytes * len(clones)
        self.pages = served("pages_copied") + served("pages_zeroed")
        self.faults = served("faults")

    def cells(self):
        return [
            self.label,
            f"{self.first_ms:,.1f} ms",
            f"{self.done_ms:,.1f} ms",
            f"{self.pages:,}" if self.lazy else "-",
            f"{self.bytes_read / MIB:,.0f} MiB",
            f"{self.faults:,}" if self.lazy else "-",
        ]


def print_table(lines):
    widths = [max(len(line[i]) for line in lines) for i in range(len(COLUMNS))]
    for line in lines:
        cells = [line[0].ljust(widths[0])] + [cell.rjust(width) for cell, width in zip(line[1:], widths[1:])]
        print("  ".join(cells).rstrip())


def main(arguments):
    pairs = []
    for argument in arguments:
        label, _, names = argument.partition("=")
        eager, lazy = names.split(",")
        pairs.append((label, Run(label, eager), Run(label, lazy)))
    print_table([COLUMNS] + [run.cells() for _, eager, lazy in pairs for run in (eager, lazy)])

    _, eager, lazy = pairs[0]
    print(
        "\nEvery guest found every byte as it was saved. Resumed lazily, the first one ran after"
        f"\n{lazy.first_ms:.1f} ms instead of {eager.first_ms:.1f} ms, without reading"
        f" {eager.memory_bytes / MIB:.0f} MiB first."
    )
    sooner = "; ".join(label for label, eager, lazy in pairs if lazy.done_ms < eager.done_ms)
    later = "; ".join(label for label, eager, lazy in pairs if lazy.done_ms >= eager.done_ms)
    print(f"Work done sooner than with reading first: {sooner or 'in no case'}. Later: {later or 'in no case'}.")
    print(
        "The image is in the page cache, which favours reading first. Guests go over their pages in random order;"
        "\na fault brings the pages around it too, so that more is read than is used (serve --fault-around)."
        "\nTimes count from the start of the program, of the slowest guest where there are several."
    )


if __name__ == "__main__":
    main(sys.argv[1:])
