// Memory advice for large tensors that torch, not a kernel of ours, fills.
#include "../common.h"

namespace {

void advise(torch::stable::Tensor x) {
  mtkd::advise_huge_pages(x.data_ptr(), x.numel() * static_cast<int64_t>(x.element_size()));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mtkd, CPU, m) { m.impl("advise_huge_pages", TORCH_BOX(&advise)); }
