# What every target is built with. Presets choose among these; see CMakePresets.json.
include(GNUInstallDirs)

set(CMAKE_CXX_STANDARD 23)
set(CMAKE_CXX_STANDARD_REQUIRED ON)
set(CMAKE_CXX_EXTENSIONS OFF)
set(CMAKE_C_STANDARD 17)
set(CMAKE_POSITION_INDEPENDENT_CODE ON)
set(CMAKE_EXPORT_COMPILE_COMMANDS ON)
set(CMAKE_RUNTIME_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR})

option(UFFDKIT_TESTS "Build the tests and the benches" ON)
option(UFFDKIT_WERROR "Treat warnings as errors" ON)
option(UFFDKIT_FUZZ "Link the fuzz targets with libFuzzer (clang)" OFF)
set(UFFDKIT_SANITIZE "" CACHE STRING "Sanitizers for -fsanitize=, comma separated; empty for none")

find_package(Threads REQUIRED)
find_package(PkgConfig REQUIRED)
find_package(fmt REQUIRED)
find_package(nlohmann_json REQUIRED)
find_package(CLI11 REQUIRED)
pkg_check_modules(SYSTEMD REQUIRED IMPORTED_TARGET libsystemd)
pkg_check_modules(COMPRESSION REQUIRED IMPORTED_TARGET libzstd libxxhash)
pkg_check_modules(SECCOMP REQUIRED IMPORTED_TARGET libseccomp>=2.5)
pkg_check_modules(URING REQUIRED IMPORTED_TARGET liburing>=2.3)

find_program(CCACHE ccache)
if(CCACHE)
  set(CMAKE_CXX_COMPILER_LAUNCHER ${CCACHE})
  set(CMAKE_C_COMPILER_LAUNCHER ${CCACHE})
endif()

add_library(uffdkit_settings INTERFACE)
target_compile_options(uffdkit_settings INTERFACE
  -Wall -Wextra -Wpedantic -Wshadow -Wconversion -Wsign-conversion -Wnon-virtual-dtor
  -Woverloaded-virtual -Wundef -fno-strict-aliasing
  $<$<BOOL:${UFFDKIT_WERROR}>:-Werror>)
if(UFFDKIT_SANITIZE)
  # Without -fno-sanitize-recover undefined behaviour is only printed, and the test passes.
  target_compile_options(uffdkit_settings INTERFACE -fsanitize=${UFFDKIT_SANITIZE} -fno-sanitize-recover=all
                                                    -fno-omit-frame-pointer -g)
  target_link_options(uffdkit_settings INTERFACE -fsanitize=${UFFDKIT_SANITIZE})
endif()
