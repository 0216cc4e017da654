// Room for what operators return, which mostly lives for an operator or two: freed blocks are kept, by size, for the
// same thread's next tensors. The C library's aligned allocation takes longer than some of the operators that it is
// for.
//
// What is large is left to torch's own allocator, and what is freed by another thread, or beyond KEPT, to the C
// library.

#include <ATen/EmptyTensor.h>
#include <c10/core/CPUAllocator.h>

#include <array>
#include <bit>
#include <cstdlib>
#include <vector>

#include "operators.h"

namespace {

constexpr size_t ALIGNMENT = 64;      // bytes, of torch's own too
constexpr size_t LARGE = 1 << 20;     // bytes of a tensor that are not kept
constexpr size_t KEPT = 32 << 20;     // bytes that a thread keeps at most
constexpr int STEPS = 4;              // sizes between two powers of two: no more than a quarter of a block is wasted

// Block sizes are (STEPS + s) << shift, s < STEPS.
int class_of(size_t bytes) {
  const size_t units = std::max<size_t>((bytes + ALIGNMENT - 1) / ALIGNMENT, STEPS);
  const int shift = std::bit_width(units) - std::bit_width(size_t{STEPS});
  const size_t steps = (units + (size_t{1} << shift) - 1) >> shift;  // STEPS .. 2 * STEPS
  return shift * STEPS + static_cast<int>(steps) - STEPS;
}

size_t size_of(int size_class) {
  return static_cast<size_t>(STEPS + size_class % STEPS) * ALIGNMENT << size_class / STEPS;
}

struct Shelf {
  std::array<std::vector<void*>, 64> blocks;  // by class
  size_t bytes = 0;

  ~Shelf() {
    for (const auto& some : blocks) {
      for (void* block : some) std::free(block);
    }
  }
};

// In front of a block's data.
struct alignas(ALIGNMENT) Head {
  Shelf* owner;
  int size_class;
};

thread_local Shelf* shelf = nullptr;
thread_local bool over = false;  // the thread has ended, but for tensors that others of its objects hold

struct Keeper {
  Keeper() { shelf = new Shelf; }
  ~Keeper() {
    delete shelf;
    shelf = nullptr, over = true;
  }
};

void give_back(void* data) {
  Head* head = static_cast<Head*>(data) - 1;
  const size_t size = size_of(head->size_class);
  if (head->owner != shelf || shelf == nullptr || shelf->bytes + size > KEPT) return std::free(head);
  shelf->blocks[head->size_class].push_back(head);
  shelf->bytes += size;
}

class Blocks final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    if (bytes == 0 || bytes > LARGE || over) return c10::GetCPUAllocator()->allocate(bytes);
    static thread_local Keeper keeper;
    const int size_class = class_of(bytes);
    const size_t size = size_of(size_class);
    auto& some = shelf->blocks[size_class];
    void* block = nullptr;
    if (!some.empty()) {
      block = some.back();
      some.pop_back();
      shelf->bytes -= size;
    } else {
      block = std::aligned_alloc(ALIGNMENT, sizeof(Head) + size);
      TORCH_CHECK(block != nullptr, "no memory for ", bytes, " bytes");
    }
    Head* head = new (block) Head{shelf, size_class};
    void* data = head + 1;
    return {data, data, give_back, c10::Device(c10::kCPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
};

}  // namespace

namespace opd {

at::Tensor empty(at::IntArrayRef shape, const at::TensorOptions& options) {
  static Blocks blocks;
  return at::detail::empty_generic(shape, &blocks, c10::DispatchKeySet(c10::DispatchKey::CPU),
                                   c10::typeMetaToScalarType(options.dtype()), std::nullopt);
}

}  // namespace opd
