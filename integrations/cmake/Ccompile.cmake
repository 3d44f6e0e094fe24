#[[
Compile ONNX models in a CMake build (3.20 or newer; Ninja or Makefiles).

    include(Ccompile)
    ccompile_add_model(<target>
      SOURCE <model.onnx>        the model
      SPEC   <spec.yaml>         the spec
      [OUTPUT <out.onnx>]        [<build folder>/<target>.onnx]
      [DATA <file>...]           data that the build itself makes; other data is found by what the compile reads
      [LOCK <lock.yaml>]         hold the build to this lock
      [OPTIONS <option>...])     more options of `ccompile`: --report, --junit, --set ...

Adds a target, part of `all`, whose property CCOMPILE_OUTPUT is the compiled model. The model is compiled again when the
model, the spec, its data, its target or a metric's source changed; targets are compiled in parallel. When a contract or
gate breaks the build stops, and the previous model stays. CCOMPILE_EXECUTABLE says which ccompile runs.
]]

find_program(CCOMPILE_EXECUTABLE ccompile DOC "The ccompile command")

function(ccompile_add_model target)
  cmake_parse_arguments(PARSE_ARGV 1 arg "" "SOURCE;SPEC;OUTPUT;LOCK" "DATA;OPTIONS")
  foreach(name SOURCE SPEC)
    if(NOT arg_${name})
      message(FATAL_ERROR "ccompile_add_model(${target}): ${name} is missing")
    endif()
  endforeach()
  if(arg_UNPARSED_ARGUMENTS)
    message(FATAL_ERROR "ccompile_add_model(${target}): unknown arguments: ${arg_UNPARSED_ARGUMENTS}")
  endif()
  if(NOT CCOMPILE_EXECUTABLE)
    message(FATAL_ERROR "ccompile_add_model(${target}): there is no `ccompile`: install it, or set CCOMPILE_EXECUTABLE")
  endif()
  if(NOT arg_OUTPUT)
    set(arg_OUTPUT "${target}.onnx")
  endif()
  get_filename_component(source "${arg_SOURCE}" ABSOLUTE)
  get_filename_component(spec "${arg_SPEC}" ABSOLUTE)
  get_filename_component(output "${arg_OUTPUT}" ABSOLUTE BASE_DIR "${CMAKE_CURRENT_BINARY_DIR}")
  get_filename_component(folder "${output}" DIRECTORY)
  set(depends "${source}" "${spec}")
  foreach(file IN LISTS arg_DATA)
    get_filename_component(file "${file}" ABSOLUTE)
    list(APPEND depends "${file}")
  endforeach()
  set(lock "")
  if(arg_LOCK)
    get_filename_component(file "${arg_LOCK}" ABSOLUTE)
    list(APPEND depends "${file}")
    set(lock --locked --lock-file "${file}")
  endif()
  file(MAKE_DIRECTORY "${folder}")
  add_custom_command(
    OUTPUT "${output}"
    BYPRODUCTS "${output}.evidence.json"
    COMMAND ${CCOMPILE_EXECUTABLE} "${source}" -s "${spec}" -o "${output}" --depfile "${output}.d" -q ${lock}
            ${arg_OPTIONS}
    DEPENDS ${depends}
    DEPFILE "${output}.d"
    COMMENT "Compiling ${target}"
    VERBATIM)
  add_custom_target(${target} ALL DEPENDS "${output}")
  set_target_properties(${target} PROPERTIES CCOMPILE_OUTPUT "${output}")
endfunction()
