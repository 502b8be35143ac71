#!/usr/bin/env python3
"""Checks that includes go down only.

    layers.py SOURCE_DIR LAYERS_TXT     checks the project
    layers.py --self-test               checks this program on small made-up projects

LAYERS_TXT is what cmake/Layers.cmake writes from the root CMakeLists.txt: a line "name: below below" for each
layer. What a layer may include is itself and all that is below it, directly or not. A file of src/NAME is in
layer NAME; a public header says its layer in its first line, "// Layer: NAME".
"""
import pathlib
import re
import sys
import tempfile
import unittest

PUBLIC = "include/uffdkit"
SUFFIXES = {".h", ".cc"}

INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*([<"])([^>"]+)[>"]', re.MULTILINE)
LAYER_LINE = re.compile(r"// Layer: (\w+)\n")
# Comments, strings and characters.
NOT_CODE = re.compile(r"""//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])'""", re.DOTALL)

# The numbers of userfaultfd's requests, ours and the system header's, and who may name them: only the kernel
# layer issues them, and src/sim answers them. Programs of their own (examples, benches, tests) are free to.
REQUEST = re.compile(r"\b(?:kIoctl[A-Z]\w*|UFFDIO_[A-Z]\w*|USERFAULTFD_IOC\w*)\b")
SYSTEM_HEADER = "linux/userfaultfd.h"
REQUEST_LAYERS = {"kernel", "sim"}
REQUEST_HEADER = PUBLIC + "/abi.h"


def read_layers(text):
    """The layers that each may include, itself among them, and what is wrong with the declarations."""
    allowed, problems = {}, []
    for line in text.splitlines():
        name, _, below = line.partition(":")
        allowed[name] = {name}
        for other in below.split():
            if other in allowed:
                allowed[name] |= allowed[other]
            else:
                problems.append(f"layer {name} is declared before {other}, which it names as below it")
    return allowed, problems


class Project:
    def __init__(self, root, layers_text):
        self.root = pathlib.Path(root)
        self.allowed, self.problems = read_layers(layers_text)
        self.public = {}  # header's name -> its layer

    def check(self):
        for path in self.files(PUBLIC):
            self.read_layer_line(path)
        for path in self.files(PUBLIC):
            self.check_file(path, self.public.get(self.name_in_public(path)), is_public=True)
        for path in self.files("src"):
            layer = path.relative_to(self.root / "src").parts[0]
            if layer in self.allowed:
                self.check_file(path, layer, is_public=False)
            else:
                self.complain(path, f"src/{layer} is no layer of the root CMakeLists.txt")
        return self.problems

    def files(self, folder):
        return sorted(p for p in (self.root / folder).rglob("*") if p.suffix in SUFFIXES and p.is_file())

    def name_in_public(self, path):
        return path.relative_to(self.root / PUBLIC).as_posix()

    def complain(self, path, problem):
        self.problems.append(f"{path.relative_to(self.root).as_posix()}: {problem}")

    def read_layer_line(self, path):
        line = LAYER_LINE.match(path.read_text())
        if not line:
            self.complain(path, 'its first line must be "// Layer: NAME"')
        elif line[1] not in self.allowed:
            self.complain(path, f"{line[1]} is no layer of the root CMakeLists.txt")
        else:
            self.public[self.name_in_public(path)] = line[1]

    def check_file(self, path, layer, is_public):
        text = path.read_text()
        for bracket, target in INCLUDE.findall(text):
            self.check_include(path, layer, is_public, bracket, target)
        self.check_requests(path, text, layer)

    def check_include(self, path, layer, is_public, bracket, target):
        parts = target.split("/")
        if ".." in parts:
            self.complain(path, f'includes "{target}": name it as "layer/file.h"')
        elif parts[0] == "uffdkit":
            name = "/".join(parts[1:])
            if (self.root / PUBLIC / name).is_file():
                self.check_direction(path, layer, target, self.public.get(name))
            else:
                self.complain(path, f"includes {target}, which is no public header")
        elif parts[0] in self.allowed and (self.root / "src" / target).is_file():
            if is_public:
                self.complain(path, f"a public header includes {target}, which is not installed")
            self.check_direction(path, layer, target, parts[0])
        elif bracket == '"':
            self.complain(path, f'includes "{target}", which is no "layer/file.h" of the project')

    def check_direction(self, path, layer, target, other):
        # A header without a layer has been complained about already.
        if layer and other and other not in self.allowed[layer]:
            self.complain(path, f"includes {target}: layer {layer} may not use {other}")

    def check_requests(self, path, text, layer):
        if layer in REQUEST_LAYERS and not path.is_relative_to(self.root / PUBLIC):
            return
        if path == self.root / REQUEST_HEADER:
            return
        if SYSTEM_HEADER in (target for _, target in INCLUDE.findall(text)):
            self.complain(path, f"includes <{SYSTEM_HEADER}>; the interface is <uffdkit/uffd.h>")
        for name in sorted(set(REQUEST.findall(NOT_CODE.sub(" ", text)))):
            self.complain(path, f"names {name}: only {', '.join(sorted(REQUEST_LAYERS))} may")


class SelfTest(unittest.TestCase):
    LAYERS = "base: \nkernel: base\nwire: base\nengine: kernel\n"
    SOUND = {
        "include/uffdkit/units.h": "// Layer: base\n#pragma once\n#include <cstdint>\n",
        "include/uffdkit/abi.h": "// Layer: kernel\nconstexpr unsigned long kIoctlCopy = 0xc028aa03;\n",
        "include/uffdkit/uffd.h": "// Layer: kernel\n#include <uffdkit/units.h>\n",
        "src/base/check.h": "#include <uffdkit/units.h>\n",
        "src/kernel/uffd.cc": '#include <uffdkit/uffd.h>\n#include "base/check.h"\nint a = kIoctlCopy;\n',
        "src/wire/frame.h": "#include <uffdkit/units.h>\n",
        "src/engine/engine.cc": '#include "base/check.h"\n// UFFDIO_COPY may stop half-way\n',
    }

    def problems(self, changes=None, layers=LAYERS):
        with tempfile.TemporaryDirectory(prefix="uffdkit-layers-") as root:
            for name, text in {**self.SOUND, **(changes or {})}.items():
                path = pathlib.Path(root, name)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text)
            return Project(root, layers).check()

    def assert_caught(self, path, text, problem):
        found = self.problems({path: text})
        self.assertEqual(len(found), 1, found)
        self.assertTrue(found[0].startswith(path + ": "), found)
        self.assertIn(problem, found[0])

    def test_a_sound_project_passes(self):
        self.assertEqual(self.problems(), [])

    def test_an_include_of_a_layer_above_is_caught(self):
        self.assert_caught("src/base/x.cc", "#include <uffdkit/uffd.h>\n", "base may not use kernel")

    def test_an_include_of_a_layer_beside_is_caught(self):
        self.assert_caught("src/wire/x.cc", "#include <uffdkit/uffd.h>\n", "wire may not use kernel")

    def test_a_private_include_of_a_layer_beside_is_caught(self):
        self.assert_caught("src/kernel/x.cc", '#include "wire/frame.h"\n', "kernel may not use wire")

    def test_angle_brackets_do_not_hide_a_private_include(self):
        self.assert_caught("src/kernel/x.cc", "#  include <wire/frame.h>\n", "kernel may not use wire")

    def test_quotes_do_not_hide_a_public_include(self):
        self.assert_caught("src/base/x.cc", '#include "uffdkit/uffd.h"\n', "base may not use kernel")

    def test_a_public_header_that_includes_upwards_is_caught(self):
        text = "// Layer: base\n#include <uffdkit/abi.h>\n"
        self.assert_caught("include/uffdkit/x.h", text, "base may not use kernel")

    def test_a_file_in_a_subfolder_is_of_its_layer(self):
        self.assert_caught("src/base/deep/x.cc", "#include <uffdkit/uffd.h>\n", "base may not use kernel")

    def test_an_include_by_way_of_the_parent_is_caught(self):
        self.assert_caught("src/engine/x.cc", '#include "../base/check.h"\n', "name it as")

    def test_an_include_without_its_layer_is_caught(self):
        self.assert_caught("src/base/x.cc", '#include "check.h"\n', 'no "layer/file.h"')

    def test_an_include_of_an_unknown_public_header_is_caught(self):
        self.assert_caught("src/base/x.cc", "#include <uffdkit/none.h>\n", "no public header")

    def test_a_public_header_that_includes_a_private_one_is_caught(self):
        text = '// Layer: base\n#include "base/check.h"\n'
        self.assert_caught("include/uffdkit/x.h", text, "not installed")

    def test_a_public_header_without_a_layer_is_caught(self):
        self.assert_caught("include/uffdkit/x.h", "#pragma once\n// Layer: base\n", "first line")

    def test_a_public_header_of_an_unknown_layer_is_caught(self):
        self.assert_caught("include/uffdkit/x.h", "// Layer: cellar\n", "cellar is no layer")

    def test_a_folder_that_is_no_layer_is_caught(self):
        self.assert_caught("src/cellar/x.cc", "", "src/cellar is no layer")

    def test_a_layer_below_that_is_declared_later_is_caught(self):
        found = self.problems(layers="base: kernel\nkernel: base\nwire: base\nengine: kernel\n")
        self.assertEqual(found, ["layer base is declared before kernel, which it names as below it"])

    def test_a_request_named_above_the_kernel_layer_is_caught(self):
        self.assert_caught("src/engine/x.cc", "int a = abi::kIoctlCopy;\n", "names kIoctlCopy")

    def test_a_request_of_the_system_header_is_caught(self):
        self.assert_caught("src/engine/x.cc", "int a = UFFDIO_COPY;\n", "names UFFDIO_COPY")

    def test_a_request_in_a_public_header_is_caught(self):
        text = "// Layer: kernel\nint a = kIoctlCopy;\n"
        self.assert_caught("include/uffdkit/x.h", text, "names kIoctlCopy")

    def test_the_system_header_is_caught(self):
        self.assert_caught("src/engine/x.cc", "#include <linux/userfaultfd.h>\n", "the interface is")

    def test_requests_in_comments_and_strings_are_no_code(self):
        text = 'auto a = "UFFDIO_COPY \\" kIoctlCopy"; /* kIoctlCopy\n UFFDIO_COPY */ // UFFDIO_COPY\n'
        self.assertEqual(self.problems({"src/engine/x.cc": text}), [])

    def test_the_model_of_the_kernel_may_name_requests(self):
        found = self.problems({"src/sim/x.cc": "int a = kIoctlCopy;\n"}, self.LAYERS + "sim: kernel\n")
        self.assertEqual(found, [])


def main(arguments):
    if arguments == ["--self-test"]:
        unittest.main(argv=["layers.py"])
    if len(arguments) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    root, layers_txt = arguments
    project = Project(root, pathlib.Path(layers_txt).read_text())
    problems = project.check()
    for problem in problems:
        print(problem)
    if not project.public:
        print(f"no public header was found in {root}/{PUBLIC}")
        return 1
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
