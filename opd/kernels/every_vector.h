// Compiles the file LOOPS once for every kind of vector instructions, in the namespaces plain, avx2 and avx512 that
// WITH_BEST of vectors.h chooses among. Included inside the includer's anonymous namespace, which defines LOOPS and the
// types that the loops take.

namespace plain {
#define KERNEL
#define BYTES 16
#include "lanes.h"
#include LOOPS
#undef KERNEL
#undef BYTES
}  // namespace plain

#ifdef OPD_X86
namespace avx2 {
#define KERNEL AVX2_KERNEL
#define BYTES 32
#include "lanes.h"
#include LOOPS
#undef KERNEL
#undef BYTES
}  // namespace avx2

namespace avx512 {
#define KERNEL AVX512_KERNEL
#define BYTES 64
#include "lanes.h"
#include LOOPS
#undef KERNEL
#undef BYTES
}  // namespace avx512
#endif

#undef LOOPS
