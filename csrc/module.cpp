// The Python module mtkd._C: loading it registers every kernel; build_info() tells how they were
// built. The only file that knows Python. It needs torch's libraries loaded: import torch first.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <sstream>
#include <string>
#include <vector>

#include "simd.h"

#ifdef USE_CUDA
#include <cuda.h>
#endif

#define MTKD_STRING_OF(...) #__VA_ARGS__
#define MTKD_STRING(...) MTKD_STRING_OF(__VA_ARGS__)

namespace {

std::string compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#else
  return "gcc " __VERSION__;
#endif
}

// What the loader picks for a loop marked MTKD_CLONES.
std::string simd_level() {
#if MTKD_HAS_CLONES
  if (__builtin_cpu_supports("x86-64-v4")) return "x86-64-v4";
  if (__builtin_cpu_supports("x86-64-v3")) return "x86-64-v3";
  return "default";
#else
  return "none";
#endif
}

// "major.minor" of the oldest torch whose stable interface the kernels use.
std::string torch_target() {
  constexpr unsigned long long kVersion = TORCH_TARGET_VERSION;
  return std::to_string(kVersion >> 56) + "." + std::to_string(kVersion >> 48 & 0xFF);
}

std::optional<std::string> cuda_version() {
#ifdef USE_CUDA
  return std::to_string(CUDA_VERSION / 1000) + "." + std::to_string(CUDA_VERSION % 1000 / 10);
#else
  return std::nullopt;
#endif
}

// setup.py passes lists as bare words between commas.
std::vector<std::string> words(const std::string& list) {
  std::vector<std::string> result;
  std::istringstream stream(list);
  for (std::string word; std::getline(stream, word, ',');) result.push_back(word);
  return result;
}

pybind11::dict build_info() {
  using namespace pybind11::literals;
  return pybind11::dict("compiler"_a = compiler(), "cpp_standard"_a = __cplusplus / 100 % 100,
                        "simd"_a = simd_level(), "torch_target"_a = torch_target(),
                        "cuda"_a = cuda_version(),
                        "cuda_architectures"_a = words(MTKD_STRING(MTKD_CUDA_ARCHITECTURES)),
                        "kernels"_a = words(MTKD_STRING(MTKD_KERNELS)));
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Compiled kernels of mtkd: importing this module registers them with PyTorch.";
  module.def("build_info", &build_info,
             "How this extension was built and which SIMD level it runs at, as a dict.");
}
