#!/usr/bin/env python3
"""Checks the documents against the project.

    docs_test.py SOURCE_DIR UFFDKIT SELFTESTS   checks the project, with its built command and selftests_tests
    docs_test.py --kernels KERNELS SELFTESTS    runs SELFTESTS and checks what KERNELS says came of it
    docs_test.py --self-test                    checks this program on made-up documents

Every subcommand has a man page that names all of its options; every relative link in a Markdown file leads to
a file; every path that README.md names in backticks, and every "./command" in its code blocks, is in the
repository; every test that a Markdown file names in backticks, as Suite.Name, is a test; each item of a list in
docs/userfaultfd.md names the tests that show it, or says that the differential programs do; the table of
docs/kernels.md has a cell for each test of SELFTESTS, and none without.

With --kernels: what the table says to pass does not fail, on the running kernel and on the model; on the model it is
not skipped either; and what it says to need something is skipped for that, unless this machine has it.
"""
import json
import pathlib
import re
import subprocess
import sys
import tempfile
import unittest

FENCED = re.compile(r"^( *)(```|~~~).*?^ *\2[ \t]*$", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\[[^\]]*\]\(\s*<?([^)\s>]+)")
LINK_DEFINITION = re.compile(r"^\[[^\]]+\]:\s*<?([^\s>]+)", re.MULTILINE)
ELSEWHERE = re.compile(r"^[a-z][a-z0-9+.-]*:|^#")
TEST_NAME = re.compile(r"^[A-Z]\w+\.[A-Z]\w{9,}$")
TEST = re.compile(r"^TEST(?:_F|_P)?\(\s*(\w+),\s*(\w+)\s*\)", re.MULTILINE)
PATH = re.compile(r"^(?:\./)?[\w.+-]+(?:/[\w.+-]+)*/?$")
COMMAND = re.compile(r"(?<![\w./])\./[\w./+-]+")
WAYS = ("syscall", "device", "syscall_model", "device_model")
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*")


def is_ignored(path, root):
    return path.relative_to(root).parts[0] in {"build", ".git", ".cache"}


def markdown_files(root):
    return sorted(p for p in root.rglob("*.md") if not is_ignored(p, root))


def broken_links(path):
    text = FENCED.sub("", path.read_text())
    text = CODE.sub("", text)
    for target in LINK.findall(text) + LINK_DEFINITION.findall(text):
        if not ELSEWHERE.match(target) and not (path.parent / target.partition("#")[0]).exists():
            yield f"{path.name}: the link to {target} leads nowhere"


def missing_paths(readme, root):
    text = readme.read_text()
    words = {code.split()[0] for code in CODE.findall(FENCED.sub("", text)) if code.strip()}
    named = {word for word in words if "/" in word and PATH.match(word)}
    for block in FENCED.finditer(text):
        named |= set(COMMAND.findall(block[0]))
    for name in sorted(named):
        if not name.removeprefix("./").startswith("build/") and not (root / name).exists():
            yield f"{readme.name}: {name} is not in the repository"


def tests_of(root):
    return {f"{suite}.{name}" for path in root.rglob("*.cc") for suite, name in TEST.findall(path.read_text())}


def missing_tests(page, tests):
    for name in CODE.findall(FENCED.sub("", page.read_text())):
        if TEST_NAME.match(name) and name not in tests:
            yield f"{page.name}: there is no test {name}"


def unshown_statements(page):
    for item in re.split(r"\n(?=- |\d+\. |\n|#)", page.read_text()):
        if not re.match(r"- |\d+\. ", item):
            continue
        shown = any(TEST_NAME.match(name) for name in CODE.findall(item))
        if not (shown or "[d]" in item or "(same tests)" in item):
            yield f"{page.name}: no test shows that '{' '.join(item.split())[:60]}...'"


def listed_tests(text):
    """The tests that --gtest_list_tests lists, as suite.test."""
    suite = ""
    for line in text.splitlines():
        word = line.partition("#")[0].rstrip()
        if word.startswith("  "):
            yield suite + word.strip()
        elif word.endswith("."):
            suite = word


def table_tests(text):
    """The tests that the tables of cases and memory types stand for, one a cell, way and machine, cells of "-" aside;
    and what each cell says."""
    types, said = [], {}
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else []
        if cells[:1] == ["case"]:
            types = cells[1:]
        elif len(cells) > 1 and types and not cells[0].startswith("--"):
            for memory, cell in zip(types, cells[1:]):
                if cell != "-":
                    said |= {f"{cells[0]}.{memory}_{way}".replace("-", "_"): cell for way in WAYS}
    return said


def untold_cases(page, listing):
    told, tests = set(table_tests(page.read_text())), set(listed_tests(listing))
    tests -= {f"api.{way}" for way in WAYS}
    if not told:
        yield f"{page.name}: there is no table of cases"
    for name in sorted(tests - told):
        yield f"{page.name}: the table has no cell for {name}"
    for name in sorted(told - tests):
        yield f"{page.name}: there is no test {name}"


def outcomes(report):
    """What came of each test in a report of gtest's: "passes", "fails", or why it was skipped."""
    for suite in report["testsuites"]:
        for test in suite["testsuite"]:
            reasons = [skipped["message"].split("\n", 1)[-1].strip() for skipped in test.get("skipped", [])]
            outcome = "fails" if "failures" in test else reasons[0] if reasons else "passes"
            yield f"{suite['name']}.{test['name']}", outcome


def untrue_cells(said, came):
    for name, cell in sorted(said.items()):
        outcome = came.get(name, "missing")
        on_model = name.endswith("_model")
        if outcome == "passes":
            continue
        if outcome in ("fails", "missing") or (cell == "passes" and on_model):
            yield f"{name}: the table says '{cell}', but: {outcome}"
        elif cell != "passes" and not outcome.startswith(cell):
            yield f"{name}: the table says '{cell}', but it was skipped for: {outcome}"


def help_sections(text):
    """The options and the subcommands that a help text lists."""
    section, options, subcommands = "", [], []
    for line in text.splitlines():
        heading = re.match(r"(\w[\w ]*):$|\[(Option Group): .*\]$", line)
        entry = re.match(r"  (\S+)", line)
        if heading:
            section = heading[1] or heading[2]
        elif not line.strip():
            section = ""
        elif entry and section == "Subcommands":
            subcommands.append(entry[1])
        elif entry and section:
            options += OPTION.findall(re.split(r"\s{2,}", line.strip())[0])
    return [o for o in options if o != "--help"], subcommands


def undocumented(man_dir, ask_help):
    """`ask_help` gives the help text of a list of words, [] for the command's own."""
    _, subcommands = help_sections(ask_help([]))
    if not subcommands:
        yield "uffdkit --help lists no subcommand"
    for name in subcommands:
        page = man_dir / f"uffdkit-{name}.1"
        if not page.is_file():
            yield f"uffdkit {name} has no man/{page.name}"
            continue
        documented = set(OPTION.findall(page.read_text().replace("\\", "")))
        waiting = [[name]]
        while waiting:
            words = waiting.pop(0)
            options, nested = help_sections(ask_help(words))
            waiting += [words + [n] for n in nested]
            for option in sorted(set(options) - documented):
                yield f"man/{page.name} does not name {option} of uffdkit {' '.join(words)}"


class SelfTest(unittest.TestCase):
    HELP = {
        (): "Usage\n\nOptions:\n  -h,--help  Print\n\nSubcommands:\n  listen   Change --this\n",
        ("listen",): "Options:\n  --control PATH   Where; see --no-option\n\nSubcommands:\n  add  A\n",
        ("listen", "add"): "[Option Group: output]\n  -j,--json   For programs\n",
    }

    def setUp(self):
        folder = tempfile.TemporaryDirectory(prefix="uffdkit-docs-")
        self.addCleanup(folder.cleanup)
        self.root = pathlib.Path(folder.name)

    def write(self, name, text):
        path = self.root / name
        path.write_text(text)
        return path

    def undocumented(self):
        return list(undocumented(self.root, lambda words: self.HELP[tuple(words)]))

    def test_a_page_that_names_every_option_passes(self):
        self.write("uffdkit-listen.1", ".B \\-\\-control\n.B --json\n")
        self.assertEqual(self.undocumented(), [])

    def test_a_subcommand_without_a_page_is_caught(self):
        self.assertEqual(self.undocumented(), ["uffdkit listen has no man/uffdkit-listen.1"])

    def test_an_option_that_its_page_does_not_name_is_caught(self):
        self.write("uffdkit-listen.1", ".B \\-\\-control\n.B \\-\\-jsonl\n")
        problem = "man/uffdkit-listen.1 does not name --json of uffdkit listen add"
        self.assertEqual(self.undocumented(), [problem])

    def test_a_link_to_nowhere_is_caught(self):
        self.write("there.md", "")
        sound = "[a](there.md#b) [b](https://x.y/z) `[c](c.md)` [d](#d)\n```\n[e](e.md)\n```\n"
        page = self.write("a.md", sound + "[f](none.md)\n[g]: gone.md\n")
        self.assertEqual(
            list(broken_links(page)),
            ["a.md: the link to none.md leads nowhere", "a.md: the link to gone.md leads nowhere"],
        )

    def test_a_test_that_is_not_there_is_caught(self):
        self.write("a_test.cc", "TEST(Page, IsPresentWhenFilled) {\nTEST(Page,\n     IsWrapped0123) {\n")
        page = self.write("a.md", "`Page.IsPresentWhenFilled` `Page.IsWrapped0123` `Page.IsLostSomewhere` `std.io`\n")
        tests = tests_of(self.root)
        self.assertEqual(list(missing_tests(page, tests)), ["a.md: there is no test Page.IsLostSomewhere"])

    def test_a_statement_that_no_test_shows_is_caught(self):
        shown = "1. One. `Page.IsPresentWhenFilled`\n2. Two, which\n   goes on. [d]\n- Three (same tests).\n\nText.\n"
        page = self.write("a.md", shown + "- Four is\n  said.\n- Five. `Page.IsPresentWhenFilled`\n")
        self.assertEqual(list(unshown_statements(page)), ["a.md: no test shows that '- Four is said....'"])

    def test_a_table_that_is_not_the_list_of_tests_is_caught(self):
        listing = "Running main() from x.cc\napi.\n" + "".join(f"  {way}\n" for way in WAYS)
        listing += "wp_fork.\n" + "".join(f"  anon_{way}\n" for way in WAYS)
        head = "| case | anon | shmem-private |\n|---|---|---|\n"
        sound = self.write("kernels.md", head + "| wp-fork | needs x | - |\n")
        self.assertEqual(list(untold_cases(sound, listing)), [])
        stale = self.write("kernels.md", head + "| wp-fork | - | passes |\n")
        self.assertEqual(
            list(untold_cases(stale, listing)),
            [f"kernels.md: the table has no cell for wp_fork.anon_{way}" for way in sorted(WAYS)]
            + [f"kernels.md: there is no test wp_fork.shmem_private_{way}" for way in sorted(WAYS)],
        )

    def test_a_cell_that_is_not_what_came_of_its_test_is_caught(self):
        said = table_tests("| case | anon |\n|---|---|\n| wp | passes |\n| pin | needs x |\n")
        skipped = lambda why: [{"message": f"a.cc:1\n{why}\n"}]
        tests = lambda **more: [{"name": f"anon_{way}"} | more.get(way, {}) for way in WAYS]
        report = lambda wp, pin: {"testsuites": [{"name": "wp", "testsuite": wp}, {"name": "pin", "testsuite": pin}]}
        sound = report(tests(device={"skipped": skipped("needs y")}), tests(device={"skipped": skipped("needs x, too")}))
        self.assertEqual(list(untrue_cells(said, dict(outcomes(sound)))), [])
        failed, other = {"failures": [{}]}, {"skipped": skipped("needs y")}
        wrong = report(tests(syscall=failed, device_model=other), tests(syscall=other))
        self.assertEqual(
            list(untrue_cells(said, dict(outcomes(wrong)))),
            [
                "pin.anon_syscall: the table says 'needs x', but it was skipped for: needs y",
                "wp.anon_device_model: the table says 'passes', but: needs y",
                "wp.anon_syscall: the table says 'passes', but: fails",
            ],
        )

    def test_a_path_that_is_not_there_is_caught(self):
        self.write("there", "")
        page = self.write(
            "README.md",
            "`./there` `./none --x` `docs/gone.md` `<uffdkit/x.h>` `/dev/kvm` `build/release/x` `serve`\n"
            "```\n./there\n./lost -R x\nread/COPY\n```\n",
        )
        self.assertEqual(
            list(missing_paths(page, self.root)),
            [f"README.md: {name} is not in the repository" for name in ("./lost", "./none", "docs/gone.md")],
        )


def main(arguments):
    if arguments == ["--self-test"]:
        unittest.main(argv=["docs_test.py"])
    if arguments[:1] == ["--kernels"] and len(arguments) == 3:
        with tempfile.TemporaryDirectory(prefix="uffdkit-docs-") as folder:
            report = pathlib.Path(folder) / "report.json"
            subprocess.run([arguments[2], f"--gtest_output=json:{report}"], check=False, stdout=subprocess.DEVNULL)
            came = dict(outcomes(json.loads(report.read_text())))
        problems = list(untrue_cells(table_tests(pathlib.Path(arguments[1]).read_text()), came))
        print("\n".join(problems))
        return 1 if problems else 0
    if len(arguments) != 3:
        print(__doc__, file=sys.stderr)
        return 2
    root, uffdkit, selftests = pathlib.Path(arguments[0]), arguments[1], arguments[2]

    def ask_help(words):
        return subprocess.run([uffdkit, *words, "--help"], check=True, capture_output=True, text=True).stdout

    problems = list(undocumented(root / "man", ask_help))
    listing = subprocess.run([selftests, "--gtest_list_tests"], check=True, capture_output=True, text=True).stdout
    problems += untold_cases(root / "docs" / "kernels.md", listing)
    problems += unshown_statements(root / "docs" / "userfaultfd.md")
    tests = tests_of(root / "tests")
    for page in markdown_files(root):
        problems += broken_links(page)
        problems += missing_tests(page, tests)
    readme = root / "README.md"
    if readme.is_file():
        problems += missing_paths(readme, root)
    for problem in problems:
        print(problem)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
