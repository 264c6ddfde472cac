# The library jointspar_cuda, where JOINTSPAR_CUDA_EXT and the machine allow it. The runtime is linked statically: the
# extension then loads on machines without a driver, and says so when a CUDA operation is called.
if(JOINTSPAR_CUDA_EXT STREQUAL "0")
  return()
endif()

include(CheckLanguage)
if(NOT CMAKE_CUDA_COMPILER)
  unset(CMAKE_CUDA_COMPILER CACHE)  # that none was found once may have changed
endif()
check_language(CUDA)
if(NOT CMAKE_CUDA_COMPILER)
  find_program(JOINTSPAR_NVCC nvcc PATHS /usr/local/cuda/bin)
  if(JOINTSPAR_NVCC)
    set(problem "${JOINTSPAR_NVCC} cannot compile with this host compiler (CUDAHOSTCXX names another; log in CMakeFiles)")
  else()
    set(problem "no CUDA compiler found: put nvcc (CUDA 12 or later) on the PATH, or name it in CUDACXX")
  endif()
  if(JOINTSPAR_CUDA_EXT STREQUAL "1")
    message(FATAL_ERROR "JOINTSPAR_CUDA_EXT=1: ${problem}. JOINTSPAR_CUDA_EXT=0 or auto builds without CUDA kernels.")
  endif()
  message(STATUS "Built without CUDA kernels: ${problem}")
  return()
endif()

# Asked before CMake tries it: an older one does not know all architectures.
execute_process(COMMAND "${CMAKE_CUDA_COMPILER}" --version OUTPUT_VARIABLE nvcc_says ERROR_QUIET)
if(nvcc_says MATCHES "release ([0-9]+)\\.[0-9]+" AND CMAKE_MATCH_1 LESS 12)
  if(JOINTSPAR_CUDA_EXT STREQUAL "1")
    message(FATAL_ERROR "JOINTSPAR_CUDA_EXT=1: ${CMAKE_CUDA_COMPILER} is of ${CMAKE_MATCH_0}; 12 or later is needed")
  endif()
  message(STATUS "${CMAKE_CUDA_COMPILER} is of ${CMAKE_MATCH_0}, not of CUDA 12 or later: built without CUDA kernels")
  return()
endif()

set(CMAKE_CUDA_ARCHITECTURES "${JOINTSPAR_CUDA_ARCHITECTURES}")
enable_language(CUDA)
if(JOINTSPAR_CUDA_EXT STREQUAL "1")
  find_package(CUDAToolkit 12.0 REQUIRED)
else()
  find_package(CUDAToolkit 12.0)
  if(NOT CUDAToolkit_FOUND)
    message(STATUS "No CUDA toolkit 12 or later beside ${CMAKE_CUDA_COMPILER}: built without CUDA kernels")
    return()
  endif()
endif()

add_library(jointspar_cuda STATIC EXCLUDE_FROM_ALL
  csrc/cuda/lars_update_cuda.cu
  csrc/cuda/pack_cuda.cu
  csrc/cuda/project_cuda.cu
  csrc/cuda/sample_cuda.cu
  csrc/cuda/sgd_update_cuda.cu
  csrc/cuda/squared_norms_cuda.cu
  csrc/cuda/unpack_cuda.cu
  csrc/cuda/update_probabilities_cuda.cu
  csrc/cuda/workspace.cu)
set_target_properties(jointspar_cuda PROPERTIES
  CUDA_STANDARD 17
  CUDA_STANDARD_REQUIRED ON
  CUDA_VISIBILITY_PRESET hidden
  # Keeps what ptxas reports (registers, spills) next to the object file, off the screen.
  CUDA_COMPILER_LAUNCHER ${PROJECT_SOURCE_DIR}/cmake/keep_log.sh)
target_include_directories(jointspar_cuda PUBLIC csrc csrc/include)
# No contraction of a * b + c, as on the CPU: elements get the same bits on both. A spill or a warning is an error
# for who develops the kernels; a build with another nvcc, or for other GPUs, goes on.
target_compile_options(jointspar_cuda PRIVATE
  -fmad=false -Xptxas=-v,-warn-spills,-warn-lmem-usage -Xcompiler=-Wall,-Wextra,-Wshadow)
if(JOINTSPAR_WERROR)
  target_compile_options(jointspar_cuda PRIVATE -Werror=all-warnings)
endif()
target_link_libraries(jointspar_cuda PUBLIC CUDA::cudart_static)
