// Which of the libraries this processor can run; compiled without any instruction-set flag, so that asking is safe anywhere.
#include "api.h"

extern "C" SH_API const char *sh_best_isa() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi");
    if (avx2 && avx512) return "avx512";
    if (avx2) return "avx2";
#endif
    return "generic";
}
