// Which compilers clone a function for several instruction sets, so that the loader can choose.
#pragma once

#if defined(__x86_64__) && defined(__linux__) && !defined(__CUDACC__) && \
    ((defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12) || __clang_major__ >= 17)
#define MTKD_HAS_CLONES 1
#define MTKD_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define MTKD_HAS_CLONES 0
#define MTKD_CLONES
#endif
