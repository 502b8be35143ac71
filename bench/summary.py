"""What bench/run makes of all results: one table with a bar for each question, and the plots of
docs/performance.md. Standard library only."""
import html
import math

# ---- the questions ----------------------------------------------------------------------------------------


def rows(results, bench, table, **wanted):
    """The rows of a bench's table whose members are the wanted ones; none if it has not run."""
    found = results.get(bench, {}).get("tables", {}).get(table, {}).get("rows", [])
    return [row for row in found if all(row[key] == value for key, value in wanted.items())]


def worst(*arguments, member, **wanted):
    """The largest of a member."""
    return lambda results: max(row[member] for row in rows(results, *arguments, **wanted))


def only(*arguments, member, **wanted):
    return lambda results: [row[member] for row in rows(results, *arguments, **wanted)].pop()


def last(*arguments, member, **wanted):
    """That of the row which the bench's table has last."""
    return lambda results: rows(results, *arguments, **wanted)[-1][member]


def quotient(above, below):
    return lambda results: above(results) / below(results)


ONE_PAGE = "uffdkit, one page a fault"
WORKING_SET = "uffdkit, working set"


def speed_of_job(way):
    return only("working_set", "working_set_job", member="seconds", way=way)


# Question, against what, the bar, whether a value above or below it is good, and how the value is found.
QUESTIONS = [
    *[(f"a fault, 1 to 4 threads, {placement}: {name}", "raw read+pread+COPY, placed likewise", 1.10, "below",
       worst("fault_latency", "fault_latency_threads", member=member, contender=ONE_PAGE, placement=placement))
      for placement in ("same CPU", "other CPU")
      for name, member in (("p50", "p50_ratio"), ("mean", "mean_ratio"), ("all of them", "took_ratio"))],
    ("a fault, placed freely: p50", "raw poll+read+pread+COPY, likewise", 1 / 3, "below",
     quotient(only("fault_latency", "fault_latency", member="p50_us", contender=ONE_PAGE, placement="free"),
              only("fault_latency", "fault_latency", member="p50_us", contender="raw poll+read+pread+COPY",
                   placement="free"))),
    ("context switches a fault, of client and manager, 1 to 16 workers", "-", 2.5, "below",
     lambda results: max(row["switches"] for row in rows(results, "fault_latency", "fault_latency")
                         if row["contender"].startswith("uffdkit, one page"))),
    ("filling 1 GiB without demand: speed", "raw pread+COPY of 64 pages", 0.90, "above",
     only("fill", "fill", member="speed_ratio", contender="uffdkit, at its end")),
    ("resume with a working set, cold disk: speed", "one page a fault", 3.7, "above",
     only("working_set", "working_set_job", member="speed", way=WORKING_SET)),
    *[("resume with a working set, cold disk: speed", way, 1.0, "above",
       quotient(speed_of_job(way), speed_of_job(WORKING_SET)))
      for way in ("all of it read first", "mmap MAP_PRIVATE of the file")],
    *[(f"the same from a compressed image{how}, {state}: speed", "from a raw one", bar, "above",
       only("image_resume", "image_resume", member="speed", state=state, way=way))
      for way, how in (("working set, stored for itself", " with the set for itself"), ("working set", ""))
      for state, bar in (("another client had it before", 0.8), ("file in page cache", 0.8), ("cold disk", 1.0))],
    ("a fault while a working set is brought, page cache: p99", "alone", 3.0, "below",
     last("working_set", "working_set_faults", member="p99_ratio", cache="page cache")),
    ("a fault while a working set is brought, cold disk: p99", "alone", 3.0, "below",
     last("working_set", "working_set_faults", member="p99_ratio", cache="cold disk")),
    ("50 clones that share: memory of all", "the first clone", 1.15, "below",
     only("clones", "clones", member="together_ratio", contender="uffdkit, shared")),
    ("the last clone: time", "mmap MAP_PRIVATE of the file", 1.5, "below",
     quotient(only("clones", "clones", member="last_ms", contender="uffdkit, shared"),
              only("clones", "clones", member="last_ms", contender="mmap MAP_PRIVATE of the file"))),
    ("5,000 idle sessions beside a busy one: p50", "the busy one alone", 1.2, "below",
     last("sessions", "sessions", member="p50_ratio")),
    ("manager's memory for each of these, KiB", "-", 16, "below",
     lambda results: sum(last("sessions", "sessions", member=member)(results)
                         for member in ("state_kib_per_session", "other_kib_per_session"))),
    *[(f"a fault in {region}: p50", "1 GiB", 1.1, "below",
       only("sparse_region", "sparse_region", member="p50_ratio_small", contender=ONE_PAGE, region=region))
      for region in ("64 GiB, a part of it", "64 GiB, all over", "1 TiB, a part of it", "1 TiB, all over")],
    *[(f"memory of one's own, {way}: speed", "PROT_NONE, SIGSEGV, mprotect", 1.0, "above",
       only("sigbus", "sigbus", member="speed_mprotect", contender=way, threads=1))
      for way in ("SigbusPager, one page", "SigbusPager as it comes", "Pager as it comes")],
    ("mappings of one's own memory, half touched: SigbusPager", "PROT_NONE, SIGSEGV, mprotect", 0.01, "below",
     quotient(*[only("sigbus", "sigbus", member="mappings", contender=way, threads=1)
                for way in ("SigbusPager as it comes", "PROT_NONE, SIGSEGV, mprotect")])),
]


def summary(results):
    """One dict for each question; `value` is None where its bench has not run."""
    answers = []
    for question, against, bar, good, value_of in QUESTIONS:
        try:
            value = value_of(results)
        except (IndexError, KeyError, ValueError):
            value = None
        holds = value is not None and (value <= bar if good == "below" else value >= bar)
        answers.append({"question": question, "against": against, "bar": round(bar, 2), "good": good,
                        "value": value, "holds": holds})
    return answers


def as_markdown(answers):
    lines = [["question", "against", "bar", "measured", "holds"]]
    for answer in answers:
        sign = "≤" if answer["good"] == "below" else "≥"
        value = "-" if answer["value"] is None else f"{answer['value']:.3g}"
        holds = "-" if answer["value"] is None else "yes" if answer["holds"] else "no"
        lines.append([answer["question"], answer["against"], f"{sign} {answer['bar']:g}", value, holds])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |" for line in lines]
    text.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(text) + "\n"


# ---- the plots --------------------------------------------------------------------------------------------

WIDTH, LABELS, BAR, GAP, TOP = 1100, 580, 14, 6, 40
COLOURS = {"good": "#2e7d4f", "bad": "#b3402e", "ours": "#2c5d9b", "other": "#9aa5b1"}


def bars(title, entries, logarithmic=False, line_at=None):
    """An SVG with a horizontal bar for each (label, value, colour, text)."""
    largest = max(entry[1] for entry in entries)
    smallest = min(entry[1] for entry in entries)
    room = WIDTH - LABELS - 140
    if logarithmic:
        low = math.log(min(smallest, line_at or smallest)) - 0.3
        scale = room / (math.log(max(largest, line_at or largest)) - low)

        def length(value):
            return (math.log(value) - low) * scale
    else:

        def length(value):
            return value / largest * room

    height = TOP + len(entries) * (BAR + GAP) + GAP
    svg = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
           'font-family="sans-serif" font-size="12">',
           f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
           f'<text x="10" y="22" font-size="15">{html.escape(title)}</text>']
    for i, (label, value, colour, text) in enumerate(entries):
        y = TOP + i * (BAR + GAP)
        svg.append(f'<text x="{LABELS - 8}" y="{y + 11}" text-anchor="end">{html.escape(label)}</text>')
        svg.append(f'<rect x="{LABELS}" y="{y}" width="{length(value):.1f}" height="{BAR}" '
                   f'fill="{COLOURS[colour]}"/>')
        svg.append(f'<text x="{LABELS + length(value) + 5:.1f}" y="{y + 11}">{html.escape(text)}</text>')
    if line_at is not None:
        x = LABELS + length(line_at)
        svg.append(f'<line x1="{x:.1f}" y1="{TOP - 6}" x2="{x:.1f}" y2="{height - GAP}" stroke="black" '
                   'stroke-dasharray="4 3"/>')
    return "\n".join(svg + ["</svg>"]) + "\n"


def plot_of_bars(answers):
    """How many times better than its bar each answer is."""
    entries = []
    for answer in answers:
        if not answer["value"]:
            continue
        better = answer["bar"] / answer["value"] if answer["good"] == "below" else answer["value"] / answer["bar"]
        against = "" if answer["against"] == "-" else f" / {answer['against']}"
        entries.append((answer["question"] + against, better, "good" if answer["holds"] else "bad",
                        f"{answer['value']:.3g}"))
    return entries and bars("Measured against its bar (the dashed line; to its right is better)", entries,
                            logarithmic=True, line_at=1.0)


def plot_of_faults(results):
    entries = []
    for row in rows(results, "fault_latency", "fault_latency_threads"):
        ours = row["contender"] == ONE_PAGE
        if ours or row["contender"].startswith("raw"):
            threads = "1 thread" if row["threads"] == 1 else f"{row['threads']} threads"
            entries.append((f"{row['placement']}, {threads}, {'uffdkit' if ours else 'raw loop'}", row["p50_us"],
                            "ours" if ours else "other", f"{row['p50_us']:.1f} µs"))
    return entries and bars("One served fault: p50", entries)


def plot_of_jobs(results):
    entries = [(row["way"], row["seconds"], "ours" if row["way"].startswith("uffdkit") else "other",
                f"{row['seconds']:.2f} s") for row in rows(results, "working_set", "working_set_job")]
    return entries and bars("A job that touches a part of its memory at random, cold disk", entries)


def plot_of_own_memory(results):
    entries = [(f"{'1 thread' if row['threads'] == 1 else str(row['threads']) + ' threads'}, {row['contender']}",
                row["us_per_page"], "ours" if "Pager" in row["contender"] else "other",
                f"{row['us_per_page']:.1f} µs, {row['mappings']} mappings")
               for row in rows(results, "sigbus", "sigbus")]
    return entries and bars("A page of one's own memory, touched at random; mappings when half was touched", entries)


def plots(results):
    """SVG texts by file name; those whose benches have not run are left out."""
    made = {"bars.svg": plot_of_bars(summary(results)), "faults.svg": plot_of_faults(results),
            "jobs.svg": plot_of_jobs(results), "own-memory.svg": plot_of_own_memory(results)}
    return {name: text for name, text in made.items() if text}
