# layer(NAME BELOW...): the sources of src/NAME, which may include themselves and the layers below.
# Headers of other layers are reached as "layer/file.h"; the public ones as <uffdkit/file.h>.
# The declarations are written to build/layers.txt, which tests/layers.py checks against the includes.
set(UFFDKIT_LAYERS_FILE ${CMAKE_BINARY_DIR}/layers.txt)
file(WRITE ${UFFDKIT_LAYERS_FILE} "")

function(layer name)
  file(GLOB sources CONFIGURE_DEPENDS ${CMAKE_SOURCE_DIR}/src/${name}/*.cc)
  add_library(layer_${name} OBJECT ${sources})
  target_include_directories(layer_${name} PUBLIC ${CMAKE_SOURCE_DIR}/src ${CMAKE_SOURCE_DIR}/include)
  target_link_libraries(layer_${name} PUBLIC fmt::fmt nlohmann_json::nlohmann_json Threads::Threads
                                      PRIVATE uffdkit_settings)
  foreach(below ${ARGN})
    target_link_libraries(layer_${name} PUBLIC layer_${below})
  endforeach()
  string(REPLACE ";" " " below_text "${ARGN}")
  file(APPEND ${UFFDKIT_LAYERS_FILE} "${name}: ${below_text}\n")
endfunction()

# library(NAME LAYERS...): the static library that is installed, made of these layers.
function(library name)
  set(objects)
  foreach(part ${ARGN})
    list(APPEND objects $<TARGET_OBJECTS:layer_${part}>)
  endforeach()
  set_property(GLOBAL PROPERTY UFFDKIT_LIBRARY_LAYERS ${ARGN})
  add_library(lib${name} STATIC ${objects})
  set_target_properties(lib${name} PROPERTIES OUTPUT_NAME ${name} EXPORT_NAME ${name})
  target_include_directories(lib${name} PUBLIC $<BUILD_INTERFACE:${CMAKE_SOURCE_DIR}/include>
                                               $<INSTALL_INTERFACE:${CMAKE_INSTALL_INCLUDEDIR}>)
  target_compile_features(lib${name} PUBLIC cxx_std_23)
  target_link_libraries(lib${name} PUBLIC fmt::fmt Threads::Threads)
  if(UFFDKIT_SANITIZE)
    target_link_options(lib${name} PUBLIC -fsanitize=${UFFDKIT_SANITIZE})
  endif()
  add_library(uffdkit::${name} ALIAS lib${name})
endfunction()

# tool(NAME LAYERS...): the command line, from src/tool, with those of its layers that the library leaves out.
function(tool name)
  file(GLOB sources CONFIGURE_DEPENDS ${CMAKE_SOURCE_DIR}/src/tool/*.cc)
  add_library(tool_objects OBJECT ${sources})
  target_include_directories(tool_objects PRIVATE ${CMAKE_SOURCE_DIR}/src)
  target_compile_definitions(tool_objects PRIVATE UFFDKIT_VERSION="${PROJECT_VERSION}")
  target_link_libraries(tool_objects PRIVATE uffdkit_settings
                                     PUBLIC libuffdkit nlohmann_json::nlohmann_json CLI11::CLI11
                                            PkgConfig::SYSTEMD PkgConfig::COMPRESSION PkgConfig::SECCOMP PkgConfig::URING)
  set_property(GLOBAL PROPERTY UFFDKIT_TOOL_LAYERS ${ARGN})
  tool_program(${name})
  string(REPLACE ";" " " below_text "${ARGN}")
  file(APPEND ${UFFDKIT_LAYERS_FILE} "tool: ${below_text}\n")
endfunction()

# tool_program(NAME SOURCES...): the same command line under another name. What the sources define takes the place of
# what the library has of it.
function(tool_program name)
  add_executable(${name} ${ARGN})
  target_link_libraries(${name} PRIVATE uffdkit_settings tool_objects)
  get_property(layers GLOBAL PROPERTY UFFDKIT_TOOL_LAYERS)
  get_property(in_library GLOBAL PROPERTY UFFDKIT_LIBRARY_LAYERS)
  foreach(part ${layers})
    if(NOT part IN_LIST in_library)
      target_sources(${name} PRIVATE $<TARGET_OBJECTS:layer_${part}>)
    endif()
  endforeach()
endfunction()
