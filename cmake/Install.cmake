# What `cmake --install` installs: the public headers, the library, the command, its man pages, and how CMake
# and pkg-config find the library. Nothing of src/ is installed.
include(CMakePackageConfigHelpers)

install(TARGETS uffdkit)
install(TARGETS libuffdkit EXPORT uffdkitTargets)
install(DIRECTORY include/uffdkit TYPE INCLUDE FILES_MATCHING PATTERN "*.h")
file(GLOB man_pages CONFIGURE_DEPENDS ${CMAKE_SOURCE_DIR}/man/*.[1-8])
foreach(page ${man_pages})
  string(REGEX REPLACE ".*\\." "" section ${page})
  install(FILES ${page} DESTINATION ${CMAKE_INSTALL_MANDIR}/man${section})
endforeach()

set(config_dir ${CMAKE_INSTALL_LIBDIR}/cmake/uffdkit)
install(EXPORT uffdkitTargets NAMESPACE uffdkit:: DESTINATION ${config_dir})
configure_package_config_file(cmake/uffdkitConfig.cmake.in uffdkitConfig.cmake
                              INSTALL_DESTINATION ${config_dir})
# Before 1.0 a new minor version may change the interface.
write_basic_package_version_file(uffdkitConfigVersion.cmake COMPATIBILITY SameMinorVersion)
install(FILES ${CMAKE_BINARY_DIR}/uffdkitConfig.cmake ${CMAKE_BINARY_DIR}/uffdkitConfigVersion.cmake
        DESTINATION ${config_dir})

# The file says where it is relative to itself, so that `cmake --install --prefix` elsewhere stays right.
set(pkgconfig_dir ${CMAKE_INSTALL_LIBDIR}/pkgconfig)
file(RELATIVE_PATH UFFDKIT_PREFIX_FROM_PC ${CMAKE_INSTALL_PREFIX}/${pkgconfig_dir} ${CMAKE_INSTALL_PREFIX})
string(REGEX REPLACE "/$" "" UFFDKIT_PREFIX_FROM_PC ${UFFDKIT_PREFIX_FROM_PC})
if(UFFDKIT_SANITIZE)
  set(UFFDKIT_PC_SANITIZE "-fsanitize=${UFFDKIT_SANITIZE}")
endif()
configure_file(cmake/uffdkit.pc.in uffdkit.pc @ONLY)
install(FILES ${CMAKE_BINARY_DIR}/uffdkit.pc DESTINATION ${pkgconfig_dir})
